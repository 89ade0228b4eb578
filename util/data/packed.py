"""Packs: the images of a split, cropped once and stored as one uint8 array that is mapped into memory.

A pack is a folder, which `python -m util.data.tool pack` writes:

    pictures.npy  uint8 (N, 3, size, size)      names.json   where each image came from
    labels.npy    int64 (N,)                    pack.json    written last: size, classes, unreadable images

Image i of the pack is image i of the split. An image that cannot be read is kept as zeros and stays marked as
bad, so training from a pack sees the same images in the same order as training from the files.
"""

import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util.data.source import Mapped, Source
from util.errors import UserError, reading

MANIFEST, PROGRESS = "pack.json", "progress.json"
IMAGES, LABELS, NAMES = "pictures.npy", "labels.npy", "names.json"


def is_pack(folder: Path) -> bool:
    """Whether the folder holds a pack, finished or not."""
    return any((folder / name).is_file() for name in (MANIFEST, PROGRESS, IMAGES))


class Packed(Source):
    """A packed split. Raises UserError if the pack is unfinished or damaged."""

    def __init__(self, folder: Path):
        if not (folder / MANIFEST).is_file():
            raise UserError(
                f"{folder}: packing was interrupted; run the same dataset_tool pack command to finish it"
            )
        with reading(folder, "the pack is damaged", "; remove it and pack again"):
            manifest = json.loads((folder / MANIFEST).read_text())
            images = np.load(folder / IMAGES, mmap_mode="r", allow_pickle=False)
            labels = np.load(folder / LABELS, allow_pickle=False)
            self.img_size = manifest["img_size"]
            shape = (len(labels), 3, self.img_size, self.img_size)
            if images.dtype != np.uint8 or images.shape != shape:
                raise ValueError(f"{IMAGES} is {images.dtype} {images.shape}, not uint8 {shape}")
            self.bad = {int(index): reason for index, reason in manifest["bad"].items()}
            super().__init__(f"packed images of {self.img_size} px", labels, manifest["classes"])
        self.folder, self.images = folder, Mapped(str(folder / IMAGES), images.offset, shape)

    @cached_property
    def names(self) -> list[str]:  # read on demand: there may be a million of them
        return json.loads((self.folder / NAMES).read_text())

    def name(self, index: int) -> str:
        return self.names[index]

    def crop(self, index: int, size: int) -> Tensor:
        """Image `index` as it was packed. `size` must be `img_size`; ImageDataset checks that."""
        if index in self.bad:
            raise UserError(self.bad[index])
        return torch.from_numpy(self.images[index])
