"""Converts between pixel values and normalised values. Only this file holds ImageNet's mean and deviation.

*Values* are the integers 0..255 of an 8-bit image. *Normalised* values are (value / 255 - mean) / std per
channel. Letters: B images, H and W in pixels.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
NUM_VALUES = 256
TEXT = 16  # pixels, the height of a line of text on a sheet


def _per_channel(constants: tuple[float, ...], like: Tensor, dim: int) -> Tensor:
    shape = [1] * like.dim()
    shape[dim] = 3
    # Three scalars filled on the data's device: copying a tensor from the host would wait for the device.
    return torch.stack([like.new_full((), constant) for constant in constants]).view(shape)


def normalize(values: Tensor, dim: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalises values 0..255 of any dtype with RGB along `dim`. Returns the same shape in `dtype`."""
    x = values.to(torch.float32)
    return ((x / 255 - _per_channel(MEAN, x, dim)) / _per_channel(STD, x, dim)).to(dtype)


def to_values(x: Tensor, dim: int = 1, dither: float = 0.0) -> Tensor:
    """Turns normalised values with RGB along `dim` into values 0..255: int64, same shape.

    `dither` is the standard deviation, in values, of Gaussian noise that is added before rounding
    (docs/format.md, "MAR levels"). It breaks the ties of numbers that are not integers, such as a patch's
    mean.
    """
    x = x.to(torch.float32)
    values = 255 * (x * _per_channel(STD, x, dim) + _per_channel(MEAN, x, dim))
    if dither:
        values = values + dither * torch.randn_like(values)
    return values.round().clamp(0, NUM_VALUES - 1).long()


def to_uint8(images: Tensor) -> Tensor:
    """Turns normalised images (B, 3, H, W) into uint8 values of the same shape."""
    return to_values(images).to(torch.uint8)


def to_numpy(images: Tensor) -> np.ndarray:
    """Turns normalised images (B, 3, H, W) into a uint8 array (B, H, W, 3) on the host."""
    return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()  # sync


def to_pil(images: Tensor) -> list[Image.Image]:
    """Turns normalised images (B, 3, H, W) into B RGB Pillow images."""
    return [Image.fromarray(image) for image in to_numpy(images)]


def make_sheet(
    images: Sequence[Image.Image],
    columns: int,
    zoom: int = 1,
    row_labels: Sequence[str] = (),
    captions: Sequence[str] = (),
    title: str = "",
) -> Image.Image:
    """Lays images of one size row by row on one RGB image, each enlarged `zoom` times without smoothing.

    row_labels  one for each row, to the left of it
    captions    one for each image, below it, cut at the image's width
    title       above all images
    """
    width, height = (side * zoom for side in images[0].size)
    gap, margin = max(2, zoom), 8 + max((7 * len(label) for label in row_labels), default=-8)
    top, pitch, rows = TEXT * bool(title), height + gap + TEXT * bool(captions), -(-len(images) // columns)
    sheet = Image.new("RGB", (margin + columns * (width + gap), top + rows * pitch), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((margin + 2, 2), title, fill="black")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        x, y = margin + column * (width + gap), top + row * pitch
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if captions:
            caption = "".join(filter(str.isprintable, captions[number]))
            while draw.textlength(caption) > width:
                caption = caption[:-1]
            draw.text((x + 1, y + height + 2), caption, fill="black")
    for row, label in enumerate(row_labels):
        draw.text((4, top + row * pitch + height // 2 - 6), label, fill="black")
    return sheet


class NotebookCanvas:
    """A step callback that shows the canvas in a notebook cell and updates it in place.

    It calls `then`, another step callback, first.
    """

    def __init__(self, then: Callable | None = None):
        self.then, self.handle = then, None

    def __call__(self, step: int, num_steps: int, canvas: Tensor) -> None:
        if self.then is not None:
            self.then(step, num_steps, canvas)
        from IPython.display import display

        images = to_pil(canvas)
        sheet = make_sheet(images, columns=min(8, len(images)), zoom=max(1, 256 // images[0].width))
        if self.handle is None:
            self.handle = display(sheet, display_id=True)
        else:
            self.handle.update(sheet)
