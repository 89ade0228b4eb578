"""Decodes an image file of any common kind to grey, RGB or RGBA with 8 bits per channel."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from util.errors import reading

# The largest allowed ratio of the long side to the short side. An image of 1 x 60000 pixels would need
# gigabytes of memory once its short side is scaled to 256 pixels.
MAX_ASPECT_RATIO = 100


def open_as(file: str | Path | BinaryIO, mode: str = "RGB", name: str | None = None) -> Image.Image:
    """Reads an image file in Pillow's mode "L" (grey), "RGB" or "RGBA", with 8 bits per channel.

    The image is turned upright as its EXIF data says. An animation gives its first frame. Its colours are
    converted as `to_mode` does. Raises UserError, which calls the file `name` (default: `file`), if it cannot
    be read.
    """
    with reading(name or file, "cannot be read as an image", "; replace or remove the file"):
        try:
            opened = Image.open(file)
        except UnidentifiedImageError as error:
            raise ValueError("not an image") from error
        with opened as image:
            if not 0 < max(image.size) <= MAX_ASPECT_RATIO * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels: too thin to crop")
            image.load()
            return to_mode(ImageOps.exif_transpose(image), mode)


def changes(image: Image.Image, mode: str = "RGB") -> str:
    """Says in words what `to_mode` changes about the colours of an image; "" for opaque ones of 8 bits."""
    found = []
    if (frames := getattr(image, "n_frames", 1)) > 1:
        found.append(f"frame {image.tell() + 1} of {frames} is taken")
    # Pillow opens 16-bit colours as RGB, without their low bytes, and says so in the tiles alone.
    if image.mode.startswith("I") or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        found.append("16 bits a channel are scaled to 8")
    elif image.mode not in ("1", "L", "P", "RGB", "LA", "PA", "RGBA", "RGBX"):
        found.append(f"its mode {image.mode} is converted to {mode}")
    clear = mode != "RGBA" and image.mode[0] not in "IF" and image.has_transparency_data
    if clear and image.convert("RGBA").getextrema()[3][0] < 255:
        found.append("transparent pixels lie over white")
    return ", ".join(found)


def to_mode(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """Converts an image of any mode to "L", "RGB" or "RGBA". Scales 16-bit values.

    RGBA keeps transparency; otherwise transparent pixels lie over white. Grey is the luma of RGB.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode.startswith("I") else 255  # Pillow opens 16-bit grey images as "I;16" or "I"
        image = Image.fromarray(np.round(values.clip(0, top) * (255 / top)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if mode == "RGBA":
            return image
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if mode == "RGB" else image.convert(mode)
