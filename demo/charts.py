"""Charts and maps for the demos: numbers as colours, boxes on an image, probabilities as bars."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

TITLE = 20  # height of a title in pixels
CHANNELS = ((200, 40, 40), (40, 150, 40), (50, 80, 210))  # colours of the bars of R, G and B


def enlarge(image: Image.Image, side: int = 256) -> Image.Image:
    """Enlarges an image to at least `side` pixels of width, by a whole number: each pixel is a square."""
    zoom = max(1, -(-side // image.width))
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def titled(image: Image.Image, title: str) -> Image.Image:
    """Puts a line of text above an image, which is as wide as before; what does not fit is cut off."""
    sheet = Image.new("RGB", (image.width, image.height + TITLE), "white")
    ImageDraw.Draw(sheet).text((2, 3), title, fill="black", font_size=13)
    sheet.paste(image, (0, TITLE))
    return sheet


def heat_map(values, high: float | None = None, low: float = 0.0, colours: str = "inferno") -> Image.Image:
    """Draws numbers (H, W), on the host, as an RGB image of that size.

    colours    name of one of matplotlib's colour maps; it reaches from `low` to `high`
    high       default: the largest number
    """
    from matplotlib import colormaps

    values = np.asarray(values, dtype=np.float64)
    high = values.max() if high is None else high
    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    return Image.fromarray(colormaps[colours](share, bytes=True)[..., :3])


def outline(
    image: Image.Image,
    boxes: Sequence[tuple[tuple[int, ...], str]],
    side: int = 256,
    around: bool = False,
) -> Image.Image:
    """Enlarges an image and draws the edges of boxes on it.

    boxes   ((x, y, width, height), colour), in pixels of `image`; later boxes cover earlier ones
    around  draws the edges around the boxes, so that all of their pixels stay visible
    """
    sheet = enlarge(image.convert("RGB"), side)
    zoom, draw = sheet.width // image.width, ImageDraw.Draw(sheet)
    for (x, y, columns, rows), colour in boxes:
        width = 3 if around else max(2, min(4, columns * zoom // 6))
        beyond = width if around else 0
        first = x * zoom - beyond, y * zoom - beyond
        last = (x + columns) * zoom - 1 + beyond, (y + rows) * zoom - 1 + beyond
        draw.rectangle((first, last), outline=colour, width=width)
    return sheet


def bar_chart(probs: Tensor, values: Sequence[int], height: int = 64) -> Image.Image:
    """Draws probabilities (C, V) of the channels, R, G and B or others, one chart below the other.

    values  C values; a triangle points at each
    """
    gap, width = 10, max(1, 512 // probs.shape[1])
    chart = Image.new("RGB", (probs.shape[1] * width, len(probs) * (height + gap)), "white")
    draw, colours = ImageDraw.Draw(chart), CHANNELS if len(probs) == 3 else ["dimgrey"] * len(probs)
    for channel, (row, drawn, colour) in enumerate(zip(probs.tolist(), values, colours, strict=True)):
        bottom = channel * (height + gap) + height
        draw.line((0, bottom, chart.width, bottom), fill="lightgrey")
        for value, probability in enumerate(row):
            top = bottom - round(probability / max(row) * (height - 4))
            draw.rectangle((value * width, top, value * width + width - 1, bottom), fill=colour)
        x = int(drawn) * width + width // 2
        draw.polygon([(x, bottom + 1), (x - 5, bottom + 8), (x + 5, bottom + 8)], fill="black")
    return chart
