"""Hugging Face data sets on this disk: a folder of parquet files as the hub has them, or what `save_to_disk` wrote."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from util.data.decode import open_rgb
from util.data.source import Source
from util.errors import UserError

VAL = ("validation", "val", "valid", "test")  # the first that is there
IMAGES, LABELS = ("image", "img"), ("label", "labels", "fine_label")


def is_huggingface(root: Path) -> bool:
    """Parquet files beside a train/ folder are taken for somebody's notes on it."""
    saved = any((root / name).is_file() for name in ("dataset_dict.json", "state.json"))
    return saved or (bool(parquet_files(root)) and not (root / "train").is_dir())


def parquet_files(root: Path) -> list[Path]:
    return sorted(path for folder in (root, root / "data") for path in folder.glob("*.parquet"))


class HuggingFace(Source):
    """A split of a data set with a column of images and, for classes, one of class labels."""

    def __init__(self, root: Path, split: str):
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"{root}: to read a Hugging Face data set, pip install 'fractalgen[hf]'"
            ) from error
        self.root = root
        try:
            self.split, table = find_split(datasets, root, split)
        except UserError:
            raise
        except Exception as error:  # of pyarrow's, of datasets' and of the file system's many kinds
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"{root}: cannot be read as a Hugging Face data set ({reason}); get it again"
            ) from error
        types = table.features
        image = [name for name, kind in types.items() if isinstance(kind, datasets.Image)] or [
            n for n in IMAGES if n in types
        ]
        label = [name for name, kind in types.items() if isinstance(kind, datasets.ClassLabel)]
        label = label or [name for name in LABELS if name in types]
        if not image:
            raise UserError(f"{root}: {self.split} has no column of images, only {', '.join(types)}")
        self.table = table.select_columns(image[:1]).cast_column(image[0], datasets.Image(decode=False))
        self.column, labels, classes = image[0], np.zeros(len(table), np.int64), []
        if label:
            values = np.asarray(table[label[0]])
            labels, classes = class_numbers(values, getattr(types[label[0]], "names", None))
            if labels.min(initial=0) < 0:
                raise UserError(
                    f"{root}: {self.split} has images without a label; train and measure on a split that has"
                )
        super().__init__(f"Hugging Face data set, {self.split}", labels, classes)

    def name(self, index: int) -> str:
        return f"{self.root}, {self.split}, row {index}"

    def image(self, index: int, at_least: int | None = None) -> Image.Image:
        cell = self.table[index][self.column] or {}
        file = cell.get("path") if cell.get("bytes") is None else io.BytesIO(cell["bytes"])
        return open_rgb(file, at_least, name=self.name(index))


def find_split(datasets, root: Path, split: str):
    """The name of the split in this data set, and its table."""
    files = {}
    for path in parquet_files(root):
        files.setdefault(path.name.split("-")[0].removesuffix(".parquet"), []).append(str(path))
    saved = None if files else datasets.load_from_disk(str(root))
    names = list(files or (saved if isinstance(saved, datasets.DatasetDict) else []))
    name = next((name for name in (VAL if split == "val" else ("train",)) if name in names), None)
    if name is None:
        wanted = f"one of {', '.join(VAL)}" if split == "val" else "train"
        raise UserError(
            f"{root}: a Hugging Face data set with the splits {', '.join(names) or 'none'}; it needs {wanted}"
        )
    return name, datasets.load_dataset(
        "parquet", data_files={name: files[name]}, split=name
    ) if files else saved[name]


def class_numbers(values: np.ndarray, names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """A column of labels -> numbers and class names."""
    if names is None and values.dtype.kind not in "iu":
        names, values = np.unique(values.astype(str), return_inverse=True)
        names = names.tolist()
    return values, list(names) if names is not None else [
        str(i) for i in range(int(values.max(initial=-1)) + 1)
    ]
