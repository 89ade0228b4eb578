"""IDX files, the format of the MNIST family: grey images of 8 bits and their labels, compressed or not.

    train-images-idx3-ubyte, t10k-images-idx3-ubyte  unsigned bytes (N, H, W)
    train-labels-idx1-ubyte, t10k-labels-idx1-ubyte  unsigned bytes (N,)

The t10k files are the validation split. A "." instead of the second "-", and .gz at the end, are known too.
"""

import gzip
import math
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from util.data.arrays import MAX_BYTES, check_labels
from util.data.decode import MAX_ASPECT_RATIO, to_mode
from util.data.source import Mapped, Source
from util.errors import UserError, reading

STEMS = {"train": "train", "val": "t10k"}


class Idx(Source):
    """The grey images of IDX files, 8 bits each. They are scaled and cropped as image files are."""

    can_mirror = False

    def __init__(self, folder: Path, split: str):
        self.path = find_idx(folder, split, "images-idx3")
        self.images = read_idx(self.path, 3)
        count, height, width = self.images.shape
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise UserError(f"{self.path}: its images of {width} x {height} pixels are too thin to crop")
        path = find_idx(folder, split, "labels-idx1")
        labels, first = read_idx(path, 1), idx_file(folder, "train", "labels-idx1")
        of_train = read_idx(first, 1) if first not in (None, path) else labels
        super().__init__(f"IDX files of {width} x {height} px", *check_labels(path, labels, count, of_train))

    def name(self, index: int) -> str:
        return f"{self.path}, row {index}"

    def image(self, index: int, mode: str = "RGB") -> Image.Image:
        return to_mode(Image.fromarray(np.asarray(self.images[index])), mode)


def idx_folder(root: Path) -> Path | None:
    """The folder with IDX images: `root`, or as torchvision lays them out, root/raw or root/MNIST/raw."""
    places = [root, root / "raw", *sorted(root.glob("*/raw"))]
    found = [place for place in places if any(idx_file(place, split, "images-idx3") for split in STEMS)]
    if len(found) > 1:
        names = ", ".join(str(place.relative_to(root)) for place in found)
        raise UserError(f"{root}: has IDX files in {names}; give one of these folders")
    return found[0] if found else None


def idx_file(folder: Path, split: str, kind: str) -> Path | None:
    """The file of "images-idx3" or "labels-idx1", uncompressed if it is there in both forms."""
    names = [f"{STEMS[split]}-{kind}-ubyte", f"{STEMS[split]}-{kind.replace('-', '.')}-ubyte"]
    paths = [folder / f"{name}{ending}" for ending in ("", ".gz") for name in names]
    return next((path for path in paths if path.is_file()), None)


def find_idx(folder: Path, split: str, kind: str) -> Path:
    if (path := idx_file(folder, split, kind)) is None:
        raise UserError(f"{folder}: {STEMS[split]}-{kind}-ubyte is missing, and so is its .gz")
    return path


def read_idx(path: Path, axes: int) -> Mapped | np.ndarray:
    """The unsigned bytes of an IDX file with so many axes. Images stay in a file that is not compressed."""
    packed, header = path.suffix == ".gz", 4 + 4 * axes
    mapped = axes > 1 and not packed
    with (
        reading(path, "cannot be read as an IDX file", "; get it again"),
        (gzip.open if packed else open)(path, "rb") as file,
    ):
        begin = file.read(header)
        if begin[:4] != bytes((0, 0, 8, axes)) or len(begin) < header:
            raise ValueError(f"it does not begin with 0, 0, 8, {axes} and {axes} lengths")
        shape = struct.unpack(f">{axes}I", begin[4:])
        size = math.prod(shape)
        if not mapped and size > MAX_BYTES:
            raise ValueError(f"it would be {size} bytes, more than {MAX_BYTES}; unpack it")
        found = path.stat().st_size - header if mapped else len(content := file.read(size + 1))
        if found != size:
            more = "more" if found > size else found
            raise ValueError(f"its header says {shape}, {size} bytes, but there are {more}")
        if not size:
            raise ValueError("it is empty")
        if mapped:
            return Mapped(str(path), header, shape)
        return np.frombuffer(content, np.uint8).reshape(shape)
