"""The centre crop of guided diffusion (ADM); published scores use it (docs/format.md, "Training recipe")."""

from PIL import Image


def center_crop_arr(pil_image: Image.Image, image_size: int) -> Image.Image:
    """Scales and crops an image of any size to the square of `image_size` pixels at its centre.

    A box filter halves the image while its short side is at least twice `image_size`. A bicubic filter then
    brings the short side to `image_size`, and the long side is cropped.
    """
    *halved, scaled = _sizes(pil_image.size, image_size)
    image = pil_image
    for size in halved:
        image = image.resize(size, Image.Resampling.BOX)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (scaled[0] - image_size) // 2, (scaled[1] - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def crop_map(size: tuple[int, int], image_size: int) -> list[tuple[float, int]]:
    """For x and for y: the scale and the offset with which `center_crop_arr` moves a place of an image.

    The place x of an image of `size` (width, height) comes to scale * x - offset of the crop.
    """
    scaled = _sizes(size, image_size)[-1]
    return [(new / old, (new - image_size) // 2) for new, old in zip(scaled, size, strict=True)]


def _sizes(size: tuple[int, int], image_size: int) -> list[tuple[int, int]]:
    """The sizes (width, height) to which an image is halved, and that to which it is then scaled."""
    sizes, (width, height) = [], size
    while min(width, height) >= 2 * image_size:
        width, height = width // 2, height // 2
        sizes.append((width, height))
    scale = image_size / min(width, height)
    return [*sizes, (round(width * scale), round(height * scale))]
