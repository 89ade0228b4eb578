"""The crop of guided diffusion (ADM), which this field's numbers are measured with (SPEC section 6)."""

from PIL import Image


def center_crop_arr(pil_image: Image.Image, image_size: int) -> Image.Image:
    """Picture of any size -> its centre, `image_size` pixels square.

    Halves with a box filter while the short side is at least twice the target, then bicubic to the target, then crops.
    """
    image = pil_image
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))
