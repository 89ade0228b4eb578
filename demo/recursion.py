"""Draws the recursion as an SVG: an image, one of its patches, one pixel, and its channels' softmaxes."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from charts import CHANNELS
from PIL import Image
from torch import Tensor

from models.likelihood.inside import Inside, Place
from util.pixels import Alphabet

WIDTH, HEIGHT = 830, 372
RED, GREEN, BLUE, UNDECIDED = "#cf222e", "#1a7f37", "#0969da", "#d4d4ee"
DASHED = "4 3"
STYLE = (
    'text{font-family:-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#1f2328}'
    ".h{font-size:17px;font-weight:600}.t{font-size:15px;fill:#424a53}.s{font-size:13.5px;fill:#424a53}"
)
IMAGE, PATCH = (24, 66, 240), (352, 86, 152)  # x, y, side of the image and of the patch
CHART = (584, 74, 222, 206)  # x, y, width, height of the charts of all channels


def in_hex(colour: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def frame(
    x: float, y: float, width: float, height: float, colour: str, line: float = 3, dash: str = ""
) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="none" stroke="{colour}" '
        f'stroke-width="{line:g}"{f" stroke-dasharray={dash!r}" * bool(dash)}/>'
    )


def pixels(image: Image.Image, known: np.ndarray, x: float, y: float, scale: float) -> str:
    """Draws an image's pixels as squares of `scale`, from (x, y); one colour stands for all not `known`."""
    rows, columns = known.shape
    runs = defaultdict(list)
    for row in range(rows):
        colours = [in_hex(image.getpixel((column, row))) for column in range(columns)]
        colours = [one if seen else UNDECIDED for one, seen in zip(colours, known[row], strict=True)]
        start = 0
        for column in range(1, columns + 1):
            if column == columns or colours[column] != colours[start]:
                length = (column - start) * scale
                place = f"M{x + start * scale:g} {y + row * scale:g}"
                runs[colours[start]].append(f"{place}h{length:g}v{scale:g}h-{length:g}z")
                start = column
    return "\n".join(
        f'<path fill="{colour}" shape-rendering="crispEdges" d="{"".join(paths)}"/>'
        for colour, paths in runs.items()
    )


def charts(alphabet: Alphabet, probs: Tensor, values: Sequence[int], entropy: Sequence[float]) -> list[str]:
    """Draws the softmax (C, V) of each channel: entropy in bits, the value that was drawn, and the peak."""
    x, top, width, total = CHART
    names = [name.upper() for name in alphabet.channel_names] if len(probs) > 1 else ["grey value"]
    height, pitch, found = total / len(probs) - 18 - 6 * (len(probs) > 1), total / len(probs) + 9, []
    for number, row in enumerate(probs.tolist()):
        y = top + number * pitch
        bottom, bar = y + height, width / len(row)
        bars = "".join(f"V{bottom - (height - 4) * one / max(row):.1f}h{bar:.3f}" for one in row)
        colour = in_hex(CHANNELS[number]) if len(probs) == 3 else "#57606a"
        before = f", given {' and '.join(names[:number])}" if number else ""
        said = f"{names[number]}{before}: {entropy[number]:.1f} bits, drawn {int(values[number])}"
        peak, right = f"peak {max(row):.2f}", row.index(max(row)) > len(row) / 2
        found += [
            f'<rect x="{x}" y="{y:g}" width="{width}" height="{height:g}" fill="#f6f8fa"/>',
            f'<path fill="{colour}" d="M{x} {bottom:g}{bars}V{bottom:g}z"/>',
            text(x, bottom + 16, said, "s"),
            text(x + (4 if right else width - 4), y + 15, peak, "s", "start" if right else "end"),
        ]
    return found


def lines_to(box: Sequence[float], x: float, top: float, bottom: float, colour: str) -> str:
    """Draws a box (x, y, width, height), and lines from its right corners to what it is enlarged to."""
    right, y, below = box[0] + box[2], box[1], box[1] + box[3]
    path = f"M{right:g} {y:g}L{x:g} {top:g}M{right:g} {below:g}L{x:g} {bottom:g}"
    return f'{frame(*box, colour)}\n<path fill="none" stroke="{colour}" stroke-width="1.5" d="{path}"/>'


def image_panel(image: Image.Image, place: Place) -> list[str]:
    """Draws what level 0 knew, the patch that it decided, and the patch's neighbours."""
    left, top, side = IMAGE
    scale, across = side / image.width, image.width // place.patch[2]

    def on_panel(box: Sequence[int]) -> tuple[float, ...]:
        return left + box[0] * scale, top + box[1] * scale, box[2] * scale, box[3] * scale

    step = f"step {place.step + 1} of {place.num_steps}"
    neighbours = [on_panel(box) for box in place.neighbours if box is not None]
    parts = [
        text(left, 30, f"Level 0: an image of {image.width} px", "h"),
        text(left, 50, f"{place.kind} over {across} x {across} patches, {step}", "t"),
        pixels(image, place.known.numpy(), left, top, scale),
        frame(left, top, side, side, "#57606a", 1),
        *(frame(*box, BLUE, 2, DASHED) for box in neighbours),
        lines_to(on_panel(place.patch), PATCH[0], PATCH[1], PATCH[1] + PATCH[2], RED),
        frame(left, 319, 13, 13, RED, 2),
        text(left + 20, 330, "the patch that is followed", "s"),
    ]
    if neighbours:
        parts.append(frame(left, 339, 13, 13, BLUE, 2, DASHED))
        parts.append(text(left + 20, 350, "neighbours: their outputs are conditions too", "s"))
    return parts


def patch_panel(image: Image.Image, place: Place) -> list[str]:
    """Draws what level 1 knew of the patch when it decided the pixel that is followed."""
    left, top, width = PATCH
    x, y, side, _ = place.image
    zoom = width / side
    pixel = (left + (place.patch[0] - x) * zoom, top + (place.patch[1] - y) * zoom, zoom, zoom)
    return [
        text(left, 30, "Level 1: one patch", "h"),
        text(left, 50, f"{place.kind} over {side} x {side} pixels", "t"),
        pixels(image.crop((x, y, x + side, y + side)), place.known.numpy(), left, top, zoom),
        frame(left, top, width, width, RED),
        lines_to(pixel, CHART[0] - 4, CHART[1], CHART[1] + CHART[3], GREEN),
        text(left, 262, f"step {place.step + 1} of {place.num_steps}", "s"),
        f'<rect x="{left}" y="319" width="13" height="13" fill="{UNDECIDED}"/>',
        text(left + 20, 330, "not decided yet", "s"),
        frame(left, 339, 13, 13, GREEN, 2),
        text(left + 20, 350, "the pixel that is followed", "s"),
    ]


def head_panel(image: Image.Image, place: Place, alphabet: Alphabet) -> list[str]:
    """Draws the softmaxes of the pixel, and the colour that was drawn."""
    left, (channels, values) = CHART[0], place.probs.shape
    colour = in_hex(image.getpixel(place.patch[:2]))
    return [
        text(left, 30, "The head: one pixel", "h"),
        text(left, 50, f"{channels} softmax{'es' * (channels > 1)} over {values} values", "t"),
        *charts(alphabet, place.probs, place.values.tolist(), place.entropy.tolist()),
        f'<rect x="{left}" y="319" width="34" height="34" fill="{colour}"/>',
        text(left + 44, 334, "the pixel, put into the patch,", "s"),
        text(left + 44, 351, "the patch into the image", "s"),
    ]


def draw_recursion(image: Image.Image, inside: Inside, alphabet: Alphabet) -> str:
    """Returns the SVG of a square image and a look inside a model with two levels above the pixel.

    Raises ValueError for a model with another number of levels.
    """
    if len(inside.places) != 2:
        raise ValueError(f"two levels above the pixel can be drawn, not {len(inside.places)}")
    image, (level_0, level_1) = image.convert("RGB"), inside.places
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    title = (
        f"An image of {image.width} pixels that a bundled model drew, one of its patches, one pixel, and the "
        "probabilities of its values"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {size} role="img">',
        f"<title>{title}</title><style>{STYLE}</style>",
        f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8" fill="#fff" '
        'stroke="#d0d7de"/>',
        *image_panel(image, level_0),
        *patch_panel(image, level_1),
        *head_panel(image, level_1, alphabet),
    ]
    return "\n".join([*parts, "</svg>\n"])
