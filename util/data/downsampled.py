"""Downsampled ImageNet (Chrabaszcz et al. 2017, arXiv 1707.08819) as published: npz or pickle.

A split consists of batches, each with `data` (N, 3 * side * side) uint8, planar RGB, and `labels` (N,), which
count from 1. Reading a pickle runs no code of the file: arrays are rebuilt from their bytes, and every other
class or function is refused.
"""

import math
import mmap
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from util.data.decode import to_mode
from util.data.source import Mapped, Source
from util.errors import UserError, one_line, reading

CLASS_LIST = "map_clsloc.txt"  # each line holds a synset, its label from 1, and its name


class Downsampled(Source):
    """The batches of one split. Rows that a file holds uncompressed stay in the file."""

    def __init__(self, root: Path, split: str):
        self.paths, self.blocks, labels = batch_files(root, split), [], []
        if not self.paths:
            raise UserError(
                f"{root}: has no batches of {split}/: train_data_batch_1, … and val_data, npz or pickle"
            )
        for path in self.paths:
            data, of_batch = read_batch(path)
            side = math.isqrt(data.shape[1] // 3)
            if self.blocks and side != self.side:
                raise UserError(
                    f"{path}: its images are not of {self.side} px, as those of {self.paths[0].name}; "
                    "keep one size"
                )
            self.side = side
            self.blocks.append(map_rows(path, data))
            labels.append(of_batch)
        self.starts = np.cumsum([0, *map(len, labels)])
        numbers, classes = class_numbers(root, np.concatenate(labels))
        files = f"{len(self.paths)} file{'s' * (len(self.paths) > 1)}"
        super().__init__(f"downsampled ImageNet, {files} of {self.side} px", numbers, classes)

    def place(self, index: int) -> tuple[int, int]:
        """The number of the batch that holds image `index`, and the row there."""
        block = int(np.searchsorted(self.starts, index, side="right")) - 1
        return block, index - int(self.starts[block])

    def name(self, index: int) -> str:
        block, row = self.place(index)
        return f"{self.paths[block]}, row {row}"

    def image(self, index: int, mode: str = "RGB") -> Image.Image:
        block, row = self.place(index)
        planes = self.blocks[block][row].reshape(3, self.side, self.side)
        return to_mode(Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0))), mode)


def batch_files(root: Path, split: str) -> list[Path]:
    """The files of a split in the order of their numbers, or []. Raises UserError if a number is missing."""
    pattern = re.compile(r"train_data_batch_(\d+)(\.npz)?" if split == "train" else r"val_data()(\.npz)?")
    paths = [path for path in root.glob(f"{split}_data*") if pattern.fullmatch(path.name)]
    found = {int(pattern.fullmatch(path.name)[1] or 1): path for path in paths}
    if len(found) < len(paths):
        raise UserError(f"{root}: has {split} batches as npz and as pickle; keep one kind")
    if found and (gaps := set(range(1, max(found) + 1)) - found.keys()):
        raise UserError(
            f"{root}: train_data_batch_{min(gaps)} is missing; there are {len(found)} of {max(found)}"
        )
    return [path for _, path in sorted(found.items())]


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads data (N, 3 * side * side) uint8 and labels (N,) int64, from 1. Raises UserError if that fails."""
    problem = "cannot be read as a batch of downsampled ImageNet"
    with reading(path, problem, "; get it again"), open(path, "rb") as file:
        if path.suffix == ".npz":
            batch = np.load(file, allow_pickle=False)
        else:
            content = ArrayUnpickler(file, encoding="bytes").load()
            batch = {as_text(key): value for key, value in content.items()}
        data, labels = np.asarray(batch["data"]), np.asarray(batch["labels"])
    side = math.isqrt(data.shape[-1] // 3) if data.ndim == 2 else 0
    if data.dtype != np.uint8 or not side or not len(data) or data.shape[1] != 3 * side * side:
        raise UserError(f"{path}: data is {data.dtype} {data.shape}, not uint8 rows of 3 * side * side")
    if labels.shape != data.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 1:
        raise UserError(
            f"{path}: labels are {labels.dtype} {labels.shape}, not {len(data)} whole numbers from 1"
        )
    return data, labels.astype(np.int64)


def class_numbers(root: Path, labels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Turns labels from 1 into numbers (N,) from 0. Returns these and the names of the classes.

    If `root` holds CLASS_LIST, the classes are its synsets in sorted order, as in folders of images.
    """
    path = root / CLASS_LIST
    if not path.is_file():
        return labels - 1, [str(label) for label in range(1, labels.max() + 1)]
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    with reading(path, "each line must hold a synset and its number, as in 'n02119789 1 kit_fox'"):
        synsets = {int(line[1]): line[0] for line in lines}
    if unknown := set(labels.tolist()) - synsets.keys():
        raise UserError(f"{path}: has no line for label {min(unknown)}")
    classes = sorted(synsets.values())
    number = {synset: i for i, synset in enumerate(classes)}
    return np.array([number[synsets[label]] for label in labels.tolist()]), classes


def map_rows(path: Path, data: np.ndarray) -> Mapped | np.ndarray:
    """Maps the rows from their file. Returns `data` itself if the file holds them in another form."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        offset = content.find(data[:1].tobytes())
    if offset < 0 or offset + data.size > path.stat().st_size:
        return data
    mapped = Mapped(str(path), offset, data.shape)
    return mapped if np.array_equal(mapped.rows, data) else data


def as_text(value: str | bytes) -> str:
    """Python 2 pickles text as bytes."""
    return value.decode() if isinstance(value, bytes) else value


class Pickled:
    """Takes the place of a NumPy array or dtype in a pickle. It only keeps what the pickle gives to NumPy."""

    def __init__(self, *arguments):
        self.arguments, self.state = arguments, None

    def __setstate__(self, state: Sequence):
        self.state = state

    def __array__(self, *_, **__) -> np.ndarray:
        """The array, which must be of integers. NumPy calls this in np.asarray."""
        if self.state is None:  # made by numpy's _frombuffer, which pickle protocol 5 calls
            raw, dtype, shape, order = self.arguments
        else:
            _, shape, dtype, by_columns, raw = self.state
            order = "F" if by_columns else "C"
        code = as_text(dtype.arguments[0])
        if not re.fullmatch("[iu][1248]", code):
            raise ValueError(f"an array of {code!r}, not of whole numbers")
        byte_order = as_text(dtype.state[1]) if dtype.state else "="
        return np.frombuffer(raw, np.dtype(code).newbyteorder(byte_order)).reshape(shape, order=order)


class ArrayUnpickler(pickle.Unpickler):
    """Builds lists, dicts, numbers and text, and `Pickled` for NumPy arrays; refuses everything else.

    NumPy's own functions for rebuilding arrays are not safe either: a file can make them read foreign memory.
    """

    ALLOWED = {  # noqa: RUF012
        ("multiarray", "_reconstruct"): Pickled,
        ("numpy", "ndarray"): Pickled,
        ("numpy", "dtype"): Pickled,
        ("numeric", "_frombuffer"): Pickled,
        ("_codecs", "encode"): lambda text, _: text.encode("latin-1"),  # bytes of Python 3 in protocol 2
    }

    def find_class(self, module: str, name: str):
        found = self.ALLOWED.get((re.sub(r"^numpy\.(_?core)\.", "", module), name))
        if found is None:
            raise UserError(f"refused, it asks for {one_line(f'{module}.{name}')} besides arrays and lists")
        return found
