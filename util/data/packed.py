"""Packs: the images of a split, cropped once and stored as one array of values that is mapped into memory.

A pack is a folder, which `python -m util.data.tool pack` writes:

    pictures.npy  uint8 (N, C, *shape), or uint16 above 256 values
    labels.npy    int64 (N,)
    names.json    where each image came from
    pack.json     written last: shape, alphabet, classes, unreadable images

Image i of the pack is image i of the split. An image that cannot be read is kept as zeros and stays marked as
bad, so training from a pack sees the same images in the same order as training from the files.
"""

import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util.data.source import Mapped, Source, cells_of, describe
from util.errors import UserError, reading
from util.pixels import RGB, Alphabet, shape_name

MANIFEST, PROGRESS = "pack.json", "progress.json"
IMAGES, LABELS, NAMES = "pictures.npy", "labels.npy", "names.json"


def is_pack(folder: Path) -> bool:
    """Whether the folder holds a pack, finished or not."""
    return any((folder / name).is_file() for name in (MANIFEST, PROGRESS, IMAGES))


def settings_of(manifest: dict) -> dict:
    """A manifest in today's form. Packs of square RGB images were written with `img_size` alone."""
    square = [manifest.pop("img_size", None)] * 2
    return {"shape": square, "alphabet": list(cells_of(RGB)), "can_mirror": True, **manifest}


class Packed(Source):
    """A packed split. Raises UserError if the pack is unfinished or damaged."""

    def __init__(self, folder: Path):
        if not (folder / MANIFEST).is_file():
            raise UserError(
                f"{folder}: packing was interrupted; run the same dataset_tool pack command to finish it"
            )
        with reading(folder, "the pack is damaged", "; remove it and pack again"):
            manifest = settings_of(json.loads((folder / MANIFEST).read_text()))
            images = np.load(folder / IMAGES, mmap_mode="r", allow_pickle=False)
            labels = np.load(folder / LABELS, allow_pickle=False)
            self.shape, self.alphabet = tuple(manifest["shape"]), Alphabet(*manifest["alphabet"])
            self.can_mirror, dtype = bool(manifest["can_mirror"]), self.alphabet.stored
            shape = (len(labels), self.alphabet.channels, *self.shape)
            if images.dtype != dtype or images.shape != shape:
                raise ValueError(f"{IMAGES} is {images.dtype} {images.shape}, not {dtype} {shape}")
            self.bad = {int(index): reason for index, reason in manifest["bad"].items()}
            held = describe(self.shape, self.alphabet)
            super().__init__(f"packed images of {held}", labels, manifest["classes"])
        self.folder = folder
        self.images = Mapped(str(folder / IMAGES), images.offset, shape, dtype.str)

    @cached_property
    def names(self) -> list[str]:  # read on demand: there may be a million of them
        return json.loads((self.folder / NAMES).read_text())

    def name(self, index: int) -> str:
        return self.names[index]

    def check(self, shape: tuple[int, ...], alphabet: Alphabet) -> None:
        if (self.shape, cells_of(self.alphabet)) != (shape, cells_of(alphabet)):
            flags = f"--img_size {shape_name(shape)}"
            if cells_of(alphabet) != cells_of(RGB):
                names = ("--channels", "--num_values", "--value_kind")
                flags += "".join(f" {name} {x}" for name, x in zip(names, cells_of(alphabet), strict=True))
            raise UserError(
                f"these {self.kind} do not fit a model of {describe(shape, alphabet)}; pack them with {flags}"
            )

    def cells(self, index: int, shape: tuple[int, ...], alphabet: Alphabet) -> Tensor:
        """Image `index` as it was packed."""
        if index in self.bad:
            raise UserError(self.bad[index])
        return torch.from_numpy(self.images[index]).to(alphabet.dtype)
