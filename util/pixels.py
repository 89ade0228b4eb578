"""Pixels and the integers behind them: the only home of ImageNet's mean and standard deviation.

*Levels* are the integers 0..255 of an 8-bit image; *normalised* values are (levels / 255 - mean) / std per channel.
Letters: B images, N rows, H and W in pixels.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
NUM_VALUES = 256


def _per_channel(values: tuple[float, ...], like: Tensor, dim: int) -> Tensor:
    shape = [1] * like.dim()
    shape[dim] = 3
    # As three scalars in one allocation on the data's device: copying a host tensor there would wait for it.
    return torch.stack([like.new_full((), v) for v in values]).view(shape)


def normalize(levels: Tensor, dim: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Levels (uint8 or any number in 0..255), RGB along `dim` -> normalised values of the same shape, `dtype`."""
    x = levels.to(torch.float32)
    return ((x / 255 - _per_channel(MEAN, x, dim)) / _per_channel(STD, x, dim)).to(dtype)


def to_values(x: Tensor, dim: int = 1, dither: float = 0.0) -> Tensor:
    """Normalised values, RGB along `dim` -> levels 0..255, int64, same shape.

    `dither` is the standard deviation, in levels, of Gaussian noise added before rounding (SPEC section 4).
    It decides ties of values that are not whole, such as the mean of a patch.
    """
    x = x.to(torch.float32)
    levels = 255 * (x * _per_channel(STD, x, dim) + _per_channel(MEAN, x, dim))
    if dither:
        levels = levels + dither * torch.randn_like(levels)
    return levels.round().clamp(0, NUM_VALUES - 1).long()


def to_uint8(images: Tensor) -> Tensor:
    """Normalised images (B, 3, H, W) -> uint8 (B, 3, H, W)."""
    return to_values(images).to(torch.uint8)


def to_numpy(images: Tensor) -> np.ndarray:
    """Normalised images (B, 3, H, W) -> uint8 array (B, H, W, 3) on the host."""
    return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Normalised images (B, 3, H, W) -> B RGB images."""
    return [Image.fromarray(image) for image in to_numpy(images)]


def make_sheet(
    images: Sequence[Image.Image], columns: int, zoom: int = 1, row_labels: Sequence[str] = ()
) -> Image.Image:
    """Images of one size, row by row -> one RGB sheet, each enlarged `zoom` times without smoothing."""
    width, height = (side * zoom for side in images[0].size)
    gap, margin = max(2, zoom), 8 + max((7 * len(label) for label in row_labels), default=-8)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (margin + columns * (width + gap), rows * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        enlarged = image.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (margin + column * (width + gap), row * (height + gap)))
    for row, label in enumerate(row_labels):
        draw.text((4, row * (height + gap) + height // 2 - 6), label, fill="black")
    return sheet


class NotebookCanvas:
    """Step callback that shows the canvas in a notebook cell, in place."""

    def __init__(self, then: Callable | None = None, every: int = 1):
        self.then, self.every, self.handle = then, every, None

    def __call__(self, step: int, num_steps: int, canvas: Tensor) -> None:
        if self.then is not None:
            self.then(step, num_steps, canvas)
        if step % self.every and step + 1 < num_steps:
            return
        from IPython.display import display

        images = to_pil(canvas)
        sheet = make_sheet(images, columns=min(8, len(images)), zoom=max(1, 256 // images[0].width))
        if self.handle is None:
            self.handle = display(sheet, display_id=True)
        else:
            self.handle.update(sheet)
