"""What a cell of a grid holds, and the conversions between its values, normalised values and 8-bit images.

Letters: N or B images, C channels, V values. An *image* is an array on a grid of one, two or three axes.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from util.errors import ArgumentError, whole_number

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VALUE_KINDS = ("ordinal", "categorical")
MAX_CHANNELS, MAX_VALUES = 2**12, 2**16
IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels
TEXT = 22  # pixels, the height of a line of text on a sheet


@dataclass(frozen=True)
class Alphabet:
    """What each cell holds: `channels` integers from 0 to `num_values` - 1 (docs/format.md, "Values").

    value_kind  "ordinal": they are amounts, and a model sees them as normalised numbers, (value / (V - 1) -
                mean) / std; "categorical": they are names, each with a learned vector
    mean, std   one number for each channel; default: ImageNet's for three ordinal channels, otherwise 0.5 and
                0.25. Categorical values are not normalised: a "normalised" value is the value itself

    Raises ArgumentError for an argument out of range.
    """

    channels: int = 3
    num_values: int = 256
    value_kind: str = "ordinal"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self):
        whole_number("channels", self.channels, 1, MAX_CHANNELS)
        whole_number("num_values", self.num_values, 2, MAX_VALUES)
        if self.value_kind not in VALUE_KINDS:
            raise ArgumentError("value_kind", f"{self.value_kind!r} must be one of {', '.join(VALUE_KINDS)}")
        rgb = IMAGENET if self.channels == 3 else ((0.5,) * self.channels, (0.25,) * self.channels)
        defaults = rgb if self.is_ordinal else ((0.0,) * self.channels, (1.0,) * self.channels)
        for name, default, low in zip(("mean", "std"), defaults, (-inf, 0), strict=True):
            given = getattr(self, name)
            numbers = default if given is None else tuple(map(float, given))
            if not self.is_ordinal and numbers != default:
                raise ArgumentError(name, "is for ordinal values; leave it out for categorical ones")
            if len(numbers) != self.channels or not all(low < number < inf for number in numbers):
                wanted = f"{self.channels} numbers, one for each channel" + ", and above 0" * (low == 0)
                raise ArgumentError(name, f"{given} must be {wanted}")
            object.__setattr__(self, name, numbers)

    @property
    def is_ordinal(self) -> bool:
        return self.value_kind == "ordinal"

    @property
    def channel_names(self) -> tuple[str, ...]:
        """ "r", "g" and "b" for three channels, otherwise "c0", "c1", …; weights and reports have them."""
        return ("r", "g", "b") if self.channels == 3 else tuple(f"c{i}" for i in range(self.channels))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of values in tensors: uint8, or int32 where they are more than 256."""
        return torch.uint8 if self.num_values <= 256 else torch.int32

    @property
    def stored(self) -> np.dtype:
        """The dtype of values in arrays and files: uint8, or uint16 where they are more than 256."""
        return np.dtype(np.uint8 if self.num_values <= 256 else "<u2")

    @property
    def _top(self) -> int:
        return self.num_values - 1 if self.is_ordinal else 1

    def normalize(self, values: Tensor, dim: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normalises values of any dtype with the channels along `dim`. Returns the same shape in `dtype`."""
        x = values.to(torch.float32)
        return ((x / self._top - _along(self.mean, x, dim)) / _along(self.std, x, dim)).to(dtype)

    def to_values(self, x: Tensor, dim: int = 1, dither: float = 0.0) -> Tensor:
        """Turns normalised values with the channels along `dim` into values: int64, same shape.

        `dither` is the standard deviation, in values, of Gaussian noise that is added before rounding
        (docs/format.md, "MAR levels"). It breaks the ties of numbers that are not integers, such as a patch's
        mean.
        """
        x = x.to(torch.float32)
        values = self._top * (x * _along(self.std, x, dim) + _along(self.mean, x, dim))
        if dither:
            values = values + dither * torch.randn_like(values)
        return values.round().clamp(0, self.num_values - 1).long()

    def is_image(self, shape: Sequence[int]) -> bool:
        """Whether a grid of this shape can be stored as an 8-bit image without loss."""
        return len(shape) == 2 and self.channels in IMAGE_MODES and self.num_values <= 256

    def from_bytes(self, samples: np.ndarray) -> np.ndarray:
        """8-bit samples x of any shape -> values round(x (V - 1) / 255): uint8, the same shape.

        For V up to 256 it undoes `to_bytes`.
        """
        if self.num_values == 256:
            return samples
        return np.rint(samples * ((self.num_values - 1) / 255)).astype(np.uint8)

    def to_bytes(self, values: np.ndarray) -> np.ndarray:
        """Values v of any shape -> 8-bit samples round(255 v / (V - 1)): uint8, the same shape."""
        if self.num_values == 256:
            return values.astype(np.uint8)
        return np.rint(values * (255 / (self.num_values - 1))).astype(np.uint8)

    def to_numpy(self, images: Tensor) -> np.ndarray:
        """Turns normalised images (B, C, …) into their values, an array (B, …, C) of `stored` on the host."""
        values = self.to_values(images).to(self.dtype).movedim(1, -1).cpu().numpy()  # sync
        return values.astype(self.stored, copy=False)

    def to_pil(self, images: Tensor) -> list[Image.Image]:
        """Turns normalised images (B, C, H, W) with `is_image` into B Pillow images: grey, RGB or RGBA."""
        samples = self.to_bytes(self.to_numpy(images))
        return [Image.fromarray(image[..., 0] if self.channels == 1 else image) for image in samples]


RGB = Alphabet()


def shape_name(shape: Sequence[int]) -> str:
    """A shape as flags have it: "28" for a square, "28x20", "64x" for one axis, "8x16x16"."""
    if len(shape) == 2 and shape[0] == shape[1]:
        return str(shape[0])
    return "x".join(map(str, shape)) + "x" * (len(shape) == 1)


def swapped(numbers: Sequence) -> Sequence:
    """From the order in which people say the axes to that of arrays, or back: two axes change places."""
    return numbers[::-1] if len(numbers) == 2 else numbers


def in_words(shape: Sequence[int | None]) -> str:
    """A shape as people say it: "28 x 20 pixels", the width first, "64 cells", "8 x 16 x 16 cells".

    None, for any number, is "any".
    """
    sides = ("any" if side is None else str(side) for side in swapped(shape))
    return f"{' x '.join(sides)} {'pixels' if len(shape) == 2 else 'cells'}"


def parse_shape(text: str) -> tuple[int, ...]:
    """The reverse of `shape_name`. Raises argparse's error for what is no shape."""
    if not re.fullmatch(r"[1-9]\d*(x|(x[1-9]\d*){1,2})?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} must be as 28, 28x20, 64x or 8x16x16, each at least 1")
    sides = tuple(int(side) for side in text.split("x") if side)
    return sides if "x" in text else sides * 2


def _along(constants: tuple[float, ...], like: Tensor, dim: int) -> Tensor:
    """One constant for each channel along `dim` of `like`, or one for all, of its dtype and device."""
    shape = [1] * like.dim()
    shape[dim] = -1
    constants = constants[:1] if len(set(constants)) == 1 else constants  # thousands of fills take time
    # Scalars filled on the data's device: copying a tensor from the host would wait for the device.
    return torch.stack([like.new_full((), constant) for constant in constants]).view(shape)


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
    font = ImageFont.load_default(TEXT - 6)
    gap, margin = max(2, zoom), 8 + ceil(max(map(font.getlength, row_labels), default=-8))
    top, pitch, rows = TEXT * bool(title), height + gap + TEXT * bool(captions), -(-len(images) // columns)
    sheet = Image.new("RGB", (margin + columns * (width + gap), top + rows * pitch), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((margin + 2, 1), title, "black", font)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        x, y = margin + column * (width + gap), top + row * pitch
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if captions:
            caption = "".join(filter(str.isprintable, captions[number]))
            while font.getlength(caption) > width:
                caption = caption[:-1]
            draw.text((x + 1, y + height + 1), caption, "black", font)
    for row, label in enumerate(row_labels):
        draw.text((4, top + row * pitch + height // 2), label, "black", font, anchor="lm")
    return sheet


class NotebookCanvas:
    """A step callback that shows the canvas in a notebook cell and updates it in place.

    It calls `then`, another step callback, first. `alphabet` is that of the images.
    """

    def __init__(self, alphabet: Alphabet, then: Callable | None = None):
        self.alphabet, self.then, self.handle = alphabet, then, None

    def __call__(self, step: int, num_steps: int, canvas: Tensor) -> None:
        if self.then is not None:
            self.then(step, num_steps, canvas)
        from IPython.display import display

        images = self.alphabet.to_pil(canvas)
        sheet = make_sheet(images, columns=min(8, len(images)), zoom=max(1, 256 // images[0].width))
        if self.handle is None:
            self.handle = display(sheet, display_id=True)
        else:
            self.handle.update(sheet)
