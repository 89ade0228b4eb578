"""Arrays of values in .npy and .npz files.

    train.npy, val.npy                integers (N, *shape, C); C may be left out if it is 1
    train_labels.npy, val_labels.npy  integers (N,) from 0; without them there are no classes
    train.npz, val.npz                the one array not called labels or classes; "labels" as above, and
                                      "classes", the names of the classes

Nothing in these files is run. Arrays stay in their file, and rows are read when used. What is compressed is
held in memory instead, and may be MAX_BYTES large.
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.data.folders import HELD_OUT_NOTE, part_of
from util.data.npz import Npz
from util.data.source import Mapped, Source, describe
from util.errors import UserError, one_line, reading
from util.pixels import MAX_VALUES, Alphabet

MAX_BYTES = 2**31
LOOKED_AT, LOOKED_AT_BYTES = 1000, 2**24  # the first rows, whose values are checked before training begins


def open_arrays(root: Path, split: str) -> Source | None:
    """Opens "train" or "val" of the arrays in `root`, a folder, or a .npy or .npz file.

    Where there is no val file, every 10th row of each class is held out. Returns None for data of another
    kind. Raises UserError for files that cannot be used.
    """
    if root.is_file():
        if root.suffix not in (".npy", ".npz"):
            raise UserError(f"{root}: a file of data must be .npy or .npz; other data are folders")
        train, val = root, None
    elif (root / "train").is_dir():
        return None  # arrays beside a folder of images, such as statistics of these, are no data
    else:
        train, val = array_file(root, "train"), array_file(root, "val")
    if val is not None and split == "val":
        return Arrays(val, like=train)
    if train is not None:
        return Arrays(train, split=None if val else split)
    if val is not None:
        raise UserError(f"{root}: has {val.name} but no train.npy or train.npz")
    return None


def array_file(root: Path, name: str) -> Path | None:
    found = [path for path in (root / f"{name}.npy", root / f"{name}.npz") if path.is_file()]
    if len(found) > 1:
        raise UserError(f"{root}: has {name} as npy and as npz; keep one of them")
    return found[0] if found else None


class Arrays(Source):
    """The rows of a file of arrays, as they are.

    like   the file that has the classes; default: `path`
    split  which rows are meant, where one file holds "train" and "val"; None: all
    """

    can_mirror = False

    def __init__(self, path: Path, like: Path | None = None, split: str | None = None):
        self.path, self.values = path, read_values(path)
        dtype, shape = self.values.dtype, self.values.shape
        labels, classes = read_labels(path, shape[0], like or path)
        self.rows = np.arange(shape[0]) if split is None else np.array(part_of(labels.tolist(), split, path))
        # As which it is read where no model says more.
        self.shape, self.alphabet = shape[1:], Alphabet(1, MAX_VALUES)
        kind = f"arrays of {'x'.join(map(str, self.shape))} {dtype}" + f", {HELD_OUT_NOTE}" * bool(split)
        super().__init__(kind, labels[self.rows], classes)

    def name(self, index: int) -> str:
        return f"{self.path}, row {self.rows[index]}"

    def image(self, index: int, mode: str = "RGB") -> Image.Image:
        raise UserError(f"{self.name(index)}: an array of values, not an image")

    def check(self, shape: tuple[int, ...], alphabet: Alphabet) -> None:
        """Raises UserError if the rows have another shape, or the first of them other values."""
        wanted = (*shape, alphabet.channels)
        if self.shape != wanted and (*self.shape, 1) != wanted:
            raise UserError(
                f"{self.path}: each row is of shape {self.shape}, but a model of {describe(shape, alphabet)} "
                f"needs {wanted}"
            )
        few = LOOKED_AT_BYTES // (math.prod(self.shape) * self.values.dtype.itemsize)
        for index in range(min(len(self), LOOKED_AT, max(1, few))):
            self.cells(index, shape, alphabet)

    def cells(self, index: int, shape: tuple[int, ...], alphabet: Alphabet) -> Tensor:
        """Row `index` as values (C, *shape). Raises UserError that names a value which is out of range."""
        row = np.asarray(self.values[self.rows[index]])
        low, high = int(row.min()), int(row.max())
        if low < 0 or high >= alphabet.num_values:
            odd = low if low < 0 else high
            raise UserError(f"{self.name(index)}: a value is {odd}, not from 0 to {alphabet.num_values - 1}")
        values = torch.from_numpy(row.astype(alphabet.stored).reshape(*shape, alphabet.channels))
        return values.to(alphabet.dtype).movedim(-1, 0).contiguous()


def read_values(path: Path) -> Mapped | np.ndarray:
    """The values (N, …) of a .npy or .npz file, which stay in the file where they are not compressed."""
    if path.suffix == ".npz":
        npz = Npz(path, MAX_BYTES)
        names = sorted(npz.arrays.keys() - {"labels", "classes"})
        if len(names) != 1:
            found = one_line(", ".join(names)) if names else "none"
            raise UserError(f"{path}: must hold one array besides labels and classes, but it has {found}")
        dtype, shape = npz.arrays[names[0]]
        check_header(path, dtype, shape)
        return npz.array(names[0])
    rows = map_npy(path)
    check_header(path, rows.dtype, rows.shape)
    return Mapped(str(path), rows.offset, rows.shape, rows.dtype.str, "C" if rows.flags.c_contiguous else "F")


def check_header(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if dtype.kind not in "biu":
        raise UserError(f"{path}: its values are {one_line(dtype)}; they must be integers, 0 to V - 1")
    if len(shape) < 2 or not all(shape):
        raise UserError(f"{path}: an array of shape {shape}; it must be (N, *shape, C) and hold something")


def map_npy(path: Path) -> np.memmap:
    """Maps a .npy file. Raises UserError for one that is damaged or holds Python objects."""
    with reading(path, "cannot be read as npy", "; get it again"):
        return np.lib.format.open_memmap(path, mode="r")


def read_labels(path: Path, count: int, like: Path) -> tuple[np.ndarray, list[str]]:
    """The labels (N,) of the `count` rows in `path`, and the classes, which those in `like` define.

    Without labels they are all 0, and there are no classes.
    """
    labels, of_like = stored(path, "labels"), stored(like, "labels")
    if labels is None and of_like is None:
        return np.zeros(count, np.int64), []
    if labels is None or of_like is None:
        missing, other = (path, like) if labels is None else (like, path)
        raise UserError(f"{missing}: has no labels, but {other.name} has; add them")
    names = stored(like, "classes")
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise UserError(f"{like}: classes is {names.dtype} {names.shape}; it must be a list of names")
    return check_labels(path, labels, count, of_like, None if names is None else names.tolist())


def check_labels(
    path: Path, labels: np.ndarray, count: int, of_train: np.ndarray, names: list[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """Labels (N,) int64, and the names of the classes; default: the numbers up to the largest of `of_train`.

    Raises UserError for labels that are none of the classes.
    """
    if labels.shape != (count,) or any(array.dtype.kind not in "iu" for array in (labels, of_train)):
        raise UserError(f"{path}: labels are {labels.dtype} {labels.shape}, not {count} integers from 0")
    if names is None:
        names = [str(number) for number in range(min(int(of_train.max(initial=0)), MAX_VALUES) + 1)]
    if len(wrong := np.flatnonzero((labels < 0) | (labels >= len(names)))):
        row = int(wrong[0])
        raise UserError(f"{path}: the label of row {row} is {labels[row]}, not from 0 to {len(names) - 1}")
    return labels.astype(np.int64), names


def stored(path: Path, name: str) -> np.ndarray | None:
    """The array "labels" or "classes" that belongs to a file of values; None where there is none."""
    if path.suffix == ".npz":
        npz = Npz(path, MAX_BYTES)
        return np.array(npz.array(name)) if name in npz.arrays else None
    beside = path.with_name(f"{path.stem}_{name}.npy")
    return np.array(map_npy(beside)) if name == "labels" and beside.is_file() else None
