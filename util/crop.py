"""The centre crop of guided diffusion (ADM); published scores use it (docs/format.md, "Training recipe")."""

from PIL import Image


def center_crop_arr(pil_image: Image.Image, image_size: int) -> Image.Image:
    """Scales and crops an image of any size to the square of `image_size` pixels at its centre.

    A box filter halves the image while its short side is at least twice `image_size`. A bicubic filter then
    brings the short side to `image_size`, and the long side is cropped.
    """
    image = pil_image
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))
