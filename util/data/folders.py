"""Folders of image files: class folders, a flat val/ with a list of labels, and images without classes."""

import os
import re
from collections import Counter
from pathlib import Path

from util.data.source import Files
from util.errors import UserError

# torchvision's list, written out because importing torchvision takes longer than importing torch, and .gif
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
HELD_OUT = 10  # of data without val/, every 10th image of each class is for validation
HELD_OUT_NOTE = f"every {HELD_OUT}th for validation"
LAYOUT = (
    "--data_path must hold images, a folder of images for every class, or train/ and val/ with these; "
    "docs/data.md has the other kinds"
)
LABEL_LISTS = (
    "val_annotations.txt",  # Tiny-ImageNet
    "LOC_val_solution.csv",  # Kaggle
    "imagenet_2012_validation_synset_labels.txt",  # TensorFlow
    "val.txt",  # Caffe
)


def open_folders(root: Path, split: str) -> Files:
    """Lists the images of "train" or "val" in `root`. Raises UserError that says what is missing.

    Where there is no val/, every HELD_OUT-th image of each class is held out, beginning with the first. They
    do not change while no file is added or removed.
    """
    train, val = root / "train", root / "val"
    if val.is_dir():
        flat = flat_split(root, val) if split == "val" else None
        return flat or class_folders(root / split)
    if train.is_dir():
        return hold_out(class_folders(train), split)
    if images_in(root):
        return hold_out(without_classes(images_below(root)), split)
    return hold_out(class_folders(root), split)


def hold_out(images: Files, split: str) -> Files:
    """The part of `images` that is for "train" or for "val", see `part_of`."""
    chosen = part_of(images.labels.tolist(), split, images.paths[0])
    kind = f"{images.kind}, {HELD_OUT_NOTE}"
    return Files(kind, [images.paths[i] for i in chosen], images.labels[chosen], images.classes)


def part_of(labels: list[int], split: str, name: object) -> list[int]:
    """The numbers of the images for "train" or for "val". A class of one image is for training only.

    Raises UserError, which begins with `name`, where nothing would be held out.
    """
    number_in_class, counts = [], Counter()
    for label in labels:
        number_in_class.append(counts[label])
        counts[label] += 1
    held_out = [
        number % HELD_OUT == 0 and counts[label] > 1
        for number, label in zip(number_in_class, labels, strict=True)
    ]
    if not any(held_out):
        raise UserError(f"{name}: too few images to hold one out; give at least two of a class")
    return [index for index, out in enumerate(held_out) if out == (split == "val")]


def class_folders(folder: Path) -> Files:
    """Lists a folder for each class, in torchvision's order.

    If no folder in it holds an image, the images of `folder` itself are listed, without classes.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {LAYOUT}")
    classes = subfolders(folder)
    found = [images_below(folder / name) for name in classes]
    if not any(found):
        if loose := images_in(folder):
            return without_classes(loose)
        raise UserError(f"{folder}: there is no image in it; {LAYOUT}")
    if empty := [name for name, paths in zip(classes, found, strict=True) if not paths]:
        names = ", ".join(empty[:9])
        raise UserError(
            f"{folder}: no image in {len(empty)} of its class folders ({names}); remove or fill them"
        )
    labels = [number for number, paths in enumerate(found) for _ in paths]
    return Files("class folders", [path for paths in found for path in paths], labels, classes)


def without_classes(paths: list[str]) -> Files:
    return Files("images without classes", paths, [0] * len(paths), [])


def flat_split(root: Path, folder: Path) -> Files | None:
    """Lists the images in val/ or val/images/ if one of LABEL_LISTS has their labels; else returns None."""
    folders, classes = subfolders(folder), subfolders(root / "train")
    paths = images_in(folder / "images" if folders == ["images"] else folder)
    if not paths or folders not in ([], ["images"]):
        return None
    for path in (place / name for name in LABEL_LISTS for place in (folder, root)):
        if path.is_file():
            labels, classes = read_labels(path, paths, classes)
            return Files(f"a flat {folder.name}/ with {path.name}", paths, labels, classes)
    if classes and not set(folders) & set(classes):
        raise UserError(
            f"{folder}: its {len(paths)} images are in no class folders and no list has their labels; "
            f"put one of {', '.join(LABEL_LISTS)} in {root}"
        )
    return None


def read_labels(path: Path, files: list[str], classes: list[str]) -> tuple[list[int], list[str]]:
    """Reads the labels of `files` from a list. Returns them and the classes.

    A line holds a file and its class, separated by a tab, a comma or a space; or the class alone, for the
    files in order. A class is one of `classes` or a number from 0 into them. If `classes` is empty, the list
    defines them.
    """
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    rows = [re.split(r"[\t,]|\s+(?=\S+$)", line.strip(), maxsplit=1) for line in lines if line.strip()]
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(files):
            raise UserError(
                f"{path}: has {len(rows)} lines for {len(files)} images; it must have one for each"
            )
        rows = [[file, *row] for file, row in zip(files, rows, strict=True)]
    by_stem = {Path(row[0]).stem: row[-1].split()[0] for row in rows if row[-1].strip()}
    if unnamed := [file for file in files if Path(file).stem not in by_stem]:
        raise UserError(
            f"{path}: has no line for {len(unnamed)} of {len(files)} images, the first is {unnamed[0]}"
        )
    found = [by_stem[Path(file).stem] for file in files]
    if not classes:
        numbers = all(name.isdecimal() for name in found)
        classes = [str(i) for i in range(max(map(int, found)) + 1)] if numbers else sorted(set(found))
    number = {**{str(i): i for i in range(len(classes))}, **{name: i for i, name in enumerate(classes)}}
    if unknown := sorted(set(found) - number.keys()):
        raise UserError(
            f"{path}: {unknown[0]!r} is none of the {len(classes)} classes; train/ must have a folder "
            "for each"
        )
    return [number[name] for name in found], classes


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted, without hidden ones. Empty if `folder` does not exist."""
    entries = os.scandir(folder) if folder.is_dir() else ()
    return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def images_in(folder: Path) -> list[str]:
    """Paths of the image files directly in `folder`, sorted by name. Empty if `folder` does not exist."""
    entries = os.scandir(folder) if folder.is_dir() else ()
    return sorted(entry.path for entry in entries if is_image(entry.name) and not entry.is_dir())


def images_below(folder: Path) -> list[str]:
    """Paths of all image files in `folder` and its subfolders, in torchvision's order."""
    found = sorted(os.walk(folder, followlinks=True))
    return [f"{place}/{name}" for place, _, names in found for name in sorted(names) if is_image(name)]


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")  # macOS leaves "._name.jpg"
