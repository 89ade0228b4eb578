"""The packed cache: the images of a split, cropped once, as one array of bytes that is mapped into memory.

    images.npy  uint8 (N, 3, size, size)        names.json   where each image came from
    labels.npy    int64 (N,)                      pack.json    written last: size, classes, which images were bad

`python -m util.data.tool pack` writes it, image i of the split at place i, a bad one too (as zeros): so training from
it meets the same images in the same order as training from the files.
"""

import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util.data.source import Mapped, Source
from util.errors import UserError

MANIFEST, PROGRESS, IMAGES, LABELS, NAMES = (
    "pack.json",
    "progress.json",
    "pictures.npy",
    "labels.npy",
    "names.json",
)


def is_pack(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (MANIFEST, PROGRESS, IMAGES))


class Packed(Source):
    """A packed split. Raises UserError where it is unfinished or damaged."""

    def __init__(self, folder: Path):
        if not (folder / MANIFEST).is_file():
            raise UserError(
                f"{folder}: packing was interrupted; run the same dataset_tool pack command to finish it"
            )
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            images = np.load(folder / IMAGES, mmap_mode="r", allow_pickle=False)
            labels = np.load(folder / LABELS, allow_pickle=False)
            self.img_size = manifest["img_size"]
            shape = (len(labels), 3, self.img_size, self.img_size)
            if images.dtype != np.uint8 or images.shape != shape:
                raise ValueError(f"{IMAGES} is {images.dtype} {images.shape}, not uint8 {shape}")
            self.bad = {int(index): reason for index, reason in manifest["bad"].items()}
            super().__init__(f"packed images of {self.img_size} px", labels, manifest["classes"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder}: the pack is damaged ({error}); remove it and pack again") from error
        self.folder, self.images = folder, Mapped(str(folder / IMAGES), images.offset, shape)

    @cached_property
    def names(self) -> list[str]:  # a million of them are not read unless someone asks
        return json.loads((self.folder / NAMES).read_text())

    def name(self, index: int) -> str:
        return self.names[index]

    def levels(self, index: int, size: int, fast: bool = False) -> Tensor:
        """As they were packed: `size` is img_size, which ImageDataset has checked."""
        if index in self.bad:
            raise UserError(self.bad[index])
        return torch.from_numpy(self.images[index])
