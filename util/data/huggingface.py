"""Hugging Face data sets on this disk: the hub's parquet files, or the output of `save_to_disk`."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from util.data.decode import open_as
from util.data.source import Source
from util.errors import UserError, reading

# The names that data sets give our splits; the first that exists is taken.
SPLITS = {"train": ("train",), "val": ("validation", "val", "valid", "test")}


def is_huggingface(root: Path) -> bool:
    """Whether `root` holds a Hugging Face data set. Parquet files beside a train/ folder do not count."""
    saved = any((root / name).is_file() for name in ("dataset_dict.json", "state.json"))
    return saved or (bool(parquet_files(root)) and not (root / "train").is_dir())


def parquet_files(root: Path) -> list[Path]:
    return sorted(path for folder in (root, root / "data") for path in folder.glob("*.parquet"))


class HuggingFace(Source):
    """One split of a data set that has a column of images and may have a column of class labels."""

    def __init__(self, root: Path, split: str):
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"{root}: to read a Hugging Face data set, pip install 'fractalgen[hf]'"
            ) from error
        self.root, classes = root, []
        with reading(root, "cannot be read as a Hugging Face data set", "; get it again"):
            self.split, table = find_split(datasets, root, split)
            self.column = find_column(table, datasets.Image, ("image", "img"))
            if self.column is None:
                raise UserError(f"{self.split} has no column of images, only {', '.join(table.column_names)}")
            labels = np.zeros(len(table))
            label = find_column(table, datasets.ClassLabel, ("label", "labels", "fine_label"))
            if label is not None:
                names = getattr(table.features[label], "names", None)
                labels, classes = class_numbers(np.asarray(table[label]), names)
                if labels.min(initial=0) < 0:
                    raise UserError(f"some images of {self.split} have no label; choose a labelled split")
            images = table.select_columns([self.column])
            self.table = images.cast_column(self.column, datasets.Image(decode=False))
        super().__init__(f"Hugging Face data set, {self.split}", labels, classes)

    def name(self, index: int) -> str:
        return f"{self.root}, {self.split}, row {index}"

    def image(self, index: int, mode: str = "RGB") -> Image.Image:
        cell = self.table[index][self.column] or {}
        file = cell.get("path") if cell.get("bytes") is None else io.BytesIO(cell["bytes"])
        return open_as(file, mode, self.name(index))


def find_split(datasets, root: Path, split: str):
    """Finds "train" or "val". Returns the name that this data set gives it, and its table."""
    files = {}
    for path in parquet_files(root):
        files.setdefault(path.name.split("-")[0].removesuffix(".parquet"), []).append(str(path))
    tables = files or datasets.load_from_disk(str(root))
    names = list(tables) if isinstance(tables, dict) else []
    name = next((name for name in SPLITS[split] if name in names), None)
    if name is None:
        wanted = f"one of {', '.join(SPLITS['val'])}" if split == "val" else "train"
        raise UserError(
            f"a Hugging Face data set with the splits {', '.join(names) or 'none'}; it needs {wanted}"
        )
    if files:
        return name, datasets.load_dataset("parquet", data_files={name: files[name]}, split=name)
    return name, tables[name]


def find_column(table, kind: type, names: Sequence[str]) -> str | None:
    """The first column whose type is `kind`, or else the first of `names` that is a column."""
    typed = [name for name, feature in table.features.items() if isinstance(feature, kind)]
    return next(iter([*typed, *(name for name in names if name in table.features)]), None)


def class_numbers(values: np.ndarray, names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """Turns a column of labels, numbers or names, into numbers (N,) from 0. Returns these and the names."""
    if names is None and values.dtype.kind not in "iu":
        names, values = np.unique(values.astype(str), return_inverse=True)
    if names is None:
        names = range(int(values.max(initial=-1)) + 1)
    return values, [str(name) for name in names]
