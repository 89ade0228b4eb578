"""The centre crop of guided diffusion (ADM); published scores use it (docs/format.md, "Training recipe")."""

from PIL import Image


def center_crop_arr(pil_image: Image.Image, image_size: int | tuple[int, int]) -> Image.Image:
    """Scales an image to cover `image_size`, which is (H, W) or the side of a square, and crops its centre.

    A box filter halves the image while it is at least twice as high and as wide as asked for. A bicubic
    filter then brings it to the least size that covers (H, W), and what is over on two sides is cropped.
    """
    height, width = _pair(image_size)
    *halved, scaled = _sizes(pil_image.size, image_size)
    image = pil_image
    for size in halved:
        image = image.resize(size, Image.Resampling.BOX)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def crop_map(size: tuple[int, int], image_size: int | tuple[int, int]) -> list[tuple[float, int]]:
    """For x and for y: the scale and the offset with which `center_crop_arr` moves a place of an image.

    The place x of an image of `size` (width, height) comes to scale * x - offset of the crop.
    """
    scaled = _sizes(size, image_size)[-1]
    sides = reversed(_pair(image_size))
    return [(new / old, (new - side) // 2) for new, old, side in zip(scaled, size, sides, strict=True)]


def _pair(image_size: int | tuple[int, int]) -> tuple[int, int]:
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


def _sizes(size: tuple[int, int], image_size: int | tuple[int, int]) -> list[tuple[int, int]]:
    """The sizes (width, height) to which an image is halved, and that to which it is then scaled."""
    sizes, (width, height), (rows, columns) = [], size, _pair(image_size)
    while height >= 2 * rows and width >= 2 * columns:
        width, height = width // 2, height // 2
        sizes.append((width, height))
    scale = max(rows / height, columns / width)
    return [*sizes, (round(width * scale), round(height * scale))]
