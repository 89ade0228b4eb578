"""Showing images: sheets as PNG, maps of numbers, and the canvas as it grows in a notebook."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from util.pixels import to_pil


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


CHANNELS = ((200, 40, 40), (40, 150, 40), (50, 80, 210))


def enlarge(image: Image.Image, side: int = 256) -> Image.Image:
    """To at least `side` pixels, each a square."""
    zoom = max(1, -(-side // image.width))
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def heat_map(values, high: float | None = None, low: float = 0.0, colours: str = "inferno") -> Image.Image:
    """Numbers (H, W) on the host -> an RGB image of that size; `colours` is a colour map of matplotlib, from `low` to `high`
    (default: the largest)."""
    from matplotlib import colormaps

    values = np.asarray(values, dtype=np.float64)
    high = values.max() if high is None else high
    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    return Image.fromarray(colormaps[colours](share, bytes=True)[..., :3])


def outline(
    image: Image.Image, boxes: Sequence[tuple[tuple[int, int, int], str]], side: int = 256
) -> Image.Image:
    """`enlarge`, with boxes (x, y, side) in pixels of the image drawn in colours; the last ones lie on top."""
    sheet = enlarge(image, side)
    zoom, draw = sheet.width // image.width, ImageDraw.Draw(sheet)
    for (x, y, size), colour in boxes:
        corners = (x * zoom, y * zoom, (x + size) * zoom - 1, (y + size) * zoom - 1)
        draw.rectangle(corners, outline=colour, width=max(2, min(4, size * zoom // 6)))
    return sheet


def bar_chart(probs: Tensor, levels: Sequence[int], height: int = 64) -> Image.Image:
    """Probabilities (3, 256) of R, G, B -> three charts, one below the other, a triangle below the drawn value."""
    gap, width = 10, 2
    chart = Image.new("RGB", (256 * width, 3 * (height + gap)), "white")
    draw = ImageDraw.Draw(chart)
    for channel, (row, level, colour) in enumerate(zip(probs.tolist(), levels, CHANNELS, strict=True)):
        bottom = channel * (height + gap) + height
        draw.line((0, bottom, chart.width, bottom), fill="lightgrey")
        for value, share in enumerate(row):
            top = bottom - round(share / max(row) * (height - 4))
            draw.rectangle((value * width, top, value * width + width - 1, bottom), fill=colour)
        x = int(level) * width + 1
        draw.polygon([(x, bottom + 1), (x - 5, bottom + 8), (x + 5, bottom + 8)], fill="black")
    return chart


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
