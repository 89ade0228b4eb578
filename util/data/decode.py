"""One image file of any kind -> RGB, 8 bits."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from util.errors import UserError

THINNEST = 100  # long side over short side: a line of 1 x 60000 pixels would need gigabytes once it is 256 pixels wide


def open_rgb(
    file: str | Path | BinaryIO, at_least: int | None = None, name: str | None = None
) -> Image.Image:
    """Any image file -> RGB, 8 bits, upright, its first frame, transparency over white. Raises UserError that names it.

    A JPEG is decoded at a half, a quarter or an eighth of its size, where its short side stays `at_least` so long.
    """
    try:
        with Image.open(file) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            if not 0 < max(image.size) <= THINNEST * min(image.size):
                raise ValueError("{} x {} pixels: too thin to crop".format(*image.size))
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # on a damaged file Pillow's readers raise whatever they stumble over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise UserError(
            f"{name or file}: cannot be read as an image ({reason}); replace or remove the file"
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any Pillow mode -> RGB, 8 bits; 16-bit values are scaled, transparency is laid over white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode.startswith("I") else 255  # Pillow opens 16-bit greys as "I;16" or "I"
        levels = np.round(values.clip(0, top) * (255 / top)).astype(np.uint8)
        return Image.fromarray(levels).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
