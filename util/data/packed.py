"""Packs: the images of a split, cropped once and stored as one array of values that is mapped into memory.

A pack is a folder, which `python -m util.data.tool pack` writes:

    pictures.npy  uint8 (N, C, *shape), or uint16 above 256 values
    labels.npy    int64 (N,)
    names.json    where each image came from
    pack.json     written last: shape, alphabet, classes, unreadable images

A pack in shards (util/data/shards.py) has pictures-00000.npy, names-00000.json, … instead, each for so many
images as pack.json says, and pack.sha256 with hashes of the arrays. It may lie at an address of fsspec.

Image i of the pack is image i of the split. An image that cannot be read is kept as zeros and stays marked as
bad, so training from a pack sees the same images in the same order as training from the files.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util.data.shards import PackFiles, Shards
from util.data.source import Mapped, Source, cells_of, describe
from util.errors import UserError, reading, warn_once
from util.pixels import RGB, Alphabet, shape_name

MANIFEST, PROGRESS = "pack.json", "progress.json"
IMAGES, LABELS, NAMES, HASHES = "pictures.npy", "labels.npy", "names.json", "pack.sha256"


def is_pack(folder: Path) -> bool:
    """Whether the folder holds a pack, finished or not."""
    return any((folder / name).is_file() for name in (MANIFEST, PROGRESS, IMAGES))


def settings_of(manifest: dict) -> dict:
    """A manifest in today's form. Packs of square RGB images were written with `img_size` alone."""
    square = [manifest.pop("img_size", None)] * 2
    default = {"shape": square, "alphabet": list(cells_of(RGB)), "can_mirror": True, "shard_images": None}
    return {**default, **manifest}


def part(name: str, number: int | None) -> str:
    """The file of shard `number`: pictures-00003.npy. None: of a pack without shards."""
    stem, _, suffix = name.partition(".")
    return name if number is None else f"{stem}-{number:05d}.{suffix}"


def parts(count: int, length: int | None) -> list[tuple[int | None, range]]:
    """The numbers of the shards of `count` images, with `length` each, and their images."""
    if length is None:
        return [(None, range(count))]
    return [(k, range(k * length, min((k + 1) * length, count))) for k in range(-(-count // length))]


class Packed(Source):
    """A packed split. Raises UserError if the pack is unfinished or damaged."""

    def __init__(self, folder: Path | str):
        if isinstance(folder, Path) and not (folder / MANIFEST).is_file():
            raise UserError(
                f"{folder}: packing was interrupted; run the same dataset_tool pack command to finish it"
            )
        self.folder, self.files = folder, PackFiles(folder)
        with reading(folder, "the pack is damaged", "; remove it and pack again"):
            manifest = settings_of(json.loads(self.files.text(MANIFEST)))
            self.shape, self.alphabet = tuple(manifest["shape"]), Alphabet(*manifest["alphabet"])
            self.can_mirror, self.length = bool(manifest["can_mirror"]), manifest["shard_images"]
            self.bad = {int(index): reason for index, reason in manifest["bad"].items()}
            labels = self.open_shards(manifest["pictures"]) if self.length else self.open_file()
            held = describe(self.shape, self.alphabet)
            super().__init__(f"packed images of {held}", labels, manifest["classes"])
        self.names: tuple[int, list[str]] = -1, []  # of one shard

    def __reduce__(self):
        return Packed, (self.folder,)  # a worker process opens the files itself

    def open_file(self) -> np.ndarray:
        """Maps the images of a pack without shards. Returns the labels."""
        if self.files.is_remote:
            raise UserError("a pack at an address must be in shards; pack with --shard_gb")
        images = np.load(self.folder / IMAGES, mmap_mode="r", allow_pickle=False)
        labels = np.load(self.folder / LABELS, allow_pickle=False)
        dtype, shape = self.alphabet.stored, (len(labels), self.alphabet.channels, *self.shape)
        if images.dtype != dtype or images.shape != shape:
            raise ValueError(f"{IMAGES} is {images.dtype} {images.shape}, not {dtype} {shape}")
        self.images = Mapped(str(self.folder / IMAGES), images.offset, shape, dtype.str)
        return labels

    def open_shards(self, count: int) -> np.ndarray:
        """Opens a pack of `count` images in shards, but no shard. Returns the labels, which are mapped."""
        files, row = self.files, np.empty((self.alphabet.channels, *self.shape), self.alphabet.stored)
        lines = re.findall(r"^([0-9a-f]{64})  (.+)$", files.text(HASHES), re.MULTILINE)
        files.hashes = {name: digest for digest, name in lines}
        with reading(LABELS, "cannot be read"), os.fdopen(files.open(LABELS, 8 * count), "rb") as file:
            start = os.fstat(file.fileno()).st_size - 8 * count  # the header of the npy file comes first
            labels = np.memmap(file, np.int64, "r", start, (count,))
        if files.is_remote and count * row.nbytes > files.cache[1]:
            warn_once(
                f"{self.folder}: {count * row.nbytes / 1e9:,.1f} GB do not fit into FRACTALGEN_CACHE_GB "
                f"{files.cache[1] / 1e9:g}, so shards are fetched again and again; give more"
            )
        self.images = Shards(files, lambda k: part(IMAGES, k), count, self.length, row)
        self.first_look = min(self.length, count)
        return labels

    def name(self, index: int) -> str:
        shard, row = divmod(index, self.length or len(self))
        if self.names[0] != shard:  # read on demand: there may be a million of them
            text = self.files.text(part(NAMES, shard if self.length else None))
            self.names = shard, json.loads(text)
        return self.names[1][row]

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
