"""Showing pictures: sheets as PNG, and the canvas as it grows in a notebook."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from util.pixels import to_pil


def make_sheet(pictures: Sequence[Image.Image], columns: int, zoom: int = 1, row_labels: Sequence[str] = ()) -> Image.Image:
    """Pictures of one size, row by row -> one RGB sheet, each enlarged `zoom` times without smoothing."""
    width, height = (side * zoom for side in pictures[0].size)
    gap, margin = max(2, zoom), 8 + max((7 * len(label) for label in row_labels), default=-8)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (margin + columns * (width + gap), rows * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (margin + column * (width + gap), row * (height + gap)))
    for row, label in enumerate(row_labels):
        draw.text((4, row * (height + gap) + height // 2 - 6), label, fill="black")
    return sheet


def heat_map(values: np.ndarray, low: float, high: float, colours: str) -> Image.Image:
    """Numbers (H, W) -> an RGB picture of that size; `colours` names a colour map of matplotlib, from `low` to `high`."""
    from matplotlib import colormaps

    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    return Image.fromarray(colormaps[colours](share, bytes=True)[..., :3])


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

        pictures = to_pil(canvas)
        sheet = make_sheet(pictures, columns=min(8, len(pictures)), zoom=max(1, 256 // pictures[0].width))
        if self.handle is None:
            self.handle = display(sheet, display_id=True)
        else:
            self.handle.update(sheet)
