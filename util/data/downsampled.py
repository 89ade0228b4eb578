"""Downsampled ImageNet (Chrabaszcz et al. 2017, arXiv 1707.08819) as it is given out: batches of rows, npz or pickle.

A batch holds `data` (N, 3 * side * side) uint8, planar RGB, and `labels`, from 1. A pickle is read without running anything
that it asks for: NumPy's arrays are taken as the bytes that they are written as, everything else is refused.
"""

import math
import mmap
import pickle
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from util.data.source import Mapped, Source
from util.errors import UserError

CLASS_LIST = "map_clsloc.txt"  # lines of synset, label from 1, name


class Downsampled(Source):
    """The batches of one split. Rows stay in the files where these hold them as they are."""

    def __init__(self, root: Path, split: str):
        paths = batch_files(root, split)
        if not paths:
            raise UserError(
                f"{root}: has no batches of {split}/: train_data_batch_1, … and val_data, npz or pickle"
            )
        self.paths, self.blocks, labels = paths, [], []
        for path in paths:
            data, of_batch = read_batch(path)
            if path != paths[0] and data.shape[1] != 3 * self.side**2:
                raise UserError(
                    f"{path}: its images are not of {self.side} px, as those of {paths[0].name}; keep one size"
                )
            self.side = math.isqrt(data.shape[1] // 3)
            self.blocks.append(in_file(path, data))
            labels.append(of_batch)
        self.starts = np.cumsum([0, *map(len, labels)])
        numbers, classes = class_numbers(root, np.concatenate(labels))
        kind = f"downsampled ImageNet, {len(paths)} file{'s' * (len(paths) > 1)} of {self.side} px"
        super().__init__(kind, numbers, classes)

    def place(self, index: int) -> tuple[int, int]:
        block = int(np.searchsorted(self.starts, index, side="right")) - 1
        return block, index - int(self.starts[block])

    def name(self, index: int) -> str:
        block, row = self.place(index)
        return f"{self.paths[block]}, row {row}"

    def image(self, index: int, at_least: int | None = None) -> Image.Image:
        block, row = self.place(index)
        planes = self.blocks[block][row].reshape(3, self.side, self.side)
        return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))


def batch_files(root: Path, split: str) -> list[Path]:
    """The batches of a split in the order of their numbers; [] where there are none. A gap raises UserError."""
    pattern = re.compile(r"train_data_batch_(\d+)(\.npz)?" if split == "train" else r"val_data()(\.npz)?")
    matches = [
        (match, path) for path in root.glob(f"{split}_data*") if (match := pattern.fullmatch(path.name))
    ]
    found = {int(match[1] or 1): path for match, path in matches}
    if len(found) < len(matches):
        raise UserError(f"{root}: has {split} batches as npz and as pickle; keep one kind")
    if found and (gaps := set(range(1, max(found) + 1)) - found.keys()):
        raise UserError(
            f"{root}: train_data_batch_{min(gaps)} is missing; there are {len(found)} of {max(found)}"
        )
    return [path for _, path in sorted(found.items())]


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """data (N, 3 * side * side) uint8 and labels (N,) int64, from 1."""
    batch = (read_npz if path.suffix == ".npz" else read_pickle)(path)
    data, labels = batch["data"], batch["labels"]
    side = math.isqrt(data.shape[-1] // 3) if data.ndim == 2 else 0
    if data.dtype != np.uint8 or not side or not len(data) or data.shape[1] != 3 * side * side:
        raise UserError(f"{path}: data is {data.dtype} {data.shape}, not uint8 rows of 3 * side * side")
    if labels.shape != data.shape[:1] or labels.dtype.kind not in "iu" or labels.min(initial=1) < 1:
        raise UserError(
            f"{path}: labels are {labels.dtype} {labels.shape}, not {len(data)} whole numbers from 1"
        )
    return data, labels.astype(np.int64)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as batch:
            return {key: batch[key] for key in ("data", "labels")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path}: cannot be read as a batch of downsampled ImageNet ({error}); get it again"
        ) from error


def class_numbers(root: Path, labels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Labels from 1 -> numbers from 0 and classes: synsets in sorted order, as folders have, where CLASS_LIST is there."""
    path = root / CLASS_LIST
    if not path.is_file():
        return labels - 1, [str(label) for label in range(1, labels.max(initial=0) + 1)]
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    if wrong := next((line for line in lines if len(line) < 2 or not line[1].isdecimal()), None):
        raise UserError(
            f"{path}: {' '.join(wrong)!r} is not a synset and its number, as in 'n02119789 1 kit_fox'"
        )
    synsets = {int(line[1]): line[0] for line in lines}
    classes = sorted(synsets.values())
    if unknown := set(labels.tolist()) - synsets.keys():
        raise UserError(f"{path}: has no line for label {min(unknown)}")
    return np.array([classes.index(synsets.get(label, classes[0])) for label in range(max(synsets) + 1)])[
        labels
    ], classes


def in_file(path: Path, data: np.ndarray) -> Mapped | np.ndarray:
    """The rows where they lie in the file, or themselves where it holds them in another form (compressed, say)."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        offset = content.find(data[:1].tobytes())
    if offset < 0 or offset + data.size > path.stat().st_size:
        return data
    mapped = Mapped(str(path), offset, data.shape)
    return mapped if np.array_equal(mapped.rows, data) else data


class Bytes:
    """What a pickle calls an array: the bytes it was written as."""

    def __init__(self, *made_of):
        self.state = None

    def __setstate__(self, state: Sequence):
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, by_columns, raw = self.state
        code = dtype.code.decode() if isinstance(dtype.code, bytes) else dtype.code
        if not re.fullmatch("[iu][1248]", code):
            raise ValueError(f"an array of {code!r}, not of whole numbers")
        values = np.frombuffer(raw, np.dtype(code).newbyteorder(dtype.order))
        return values.reshape(shape, order="F" if by_columns else "C")


class Code:
    """What a pickle calls a dtype."""

    def __init__(self, code, *_):
        self.code, self.order = code, "="

    def __setstate__(self, state: Sequence):
        order = state[1]
        self.order = {"<": "<", ">": ">", b"<": "<", b">": ">"}.get(order, "=")


def from_buffer(raw, dtype, shape, order) -> Bytes:
    array = Bytes()
    array.state = 1, shape, dtype, order == "F", raw
    return array


class Reader(pickle.Unpickler):
    """Builds lists, dicts, numbers, text, and `Bytes` for arrays. NumPy's own rebuilding can be led to wild memory."""

    KNOWN = {  # noqa: RUF012
        ("multiarray", "_reconstruct"): Bytes,
        ("numpy", "ndarray"): Bytes,
        ("numpy", "dtype"): Code,
        ("numeric", "_frombuffer"): from_buffer,
        ("_codecs", "encode"): lambda text, _: text.encode(
            "latin-1"
        ),  # bytes, as Python 3 writes them in protocol 2
    }

    def find_class(self, module: str, name: str):
        known = self.KNOWN.get((re.sub(r"^numpy\.(_?core)\.", "", module), name))
        if known is None:
            raise UserError(
                f"{self.path}: refused, it asks for {module}.{name}; a batch holds arrays and lists only"
            )
        return known


def read_pickle(path: Path) -> dict[str, np.ndarray]:
    """A pickled batch's data and labels, arrays as NumPy's. Runs nothing that the file asks for."""
    try:
        with open(path, "rb") as file:
            reader = Reader(file, encoding="bytes")
            reader.path = path
            content = reader.load()
        named = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        found = {key: named[key] for key in ("data", "labels")}
        return {
            key: value.array() if isinstance(value, Bytes) else np.array(value)
            for key, value in found.items()
        }
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{path}: cannot be read as a batch of downsampled ImageNet ({reason}); get it again"
        ) from error
