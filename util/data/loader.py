"""Images of any source as uint8 crops, in an order that anyone can repeat.

The order of an epoch, every random flip and what stands in for an image that cannot be read are functions of
(seed, epoch, image number), whatever the number of processes or workers. Normalising happens on the device
(util/pixels.py).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from util import dist
from util.data.downsampled import Downsampled, batch_files
from util.data.folders import class_folders, open_folders
from util.data.huggingface import HuggingFace, is_huggingface
from util.data.packed import Packed, is_pack
from util.data.source import Source
from util.dist import World
from util.errors import UserError
from util.signals import ignore_in_worker

BAD_IN_A_ROW = 100  # so many bad images one after the other are a disk that is gone rather than bad images
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def open_split(root: Path, split: str) -> Source:
    """Recognises what kind of data set lies in `root` and lists its "train" or "val". Raises UserError if it is none."""
    if is_pack(root / split):
        return Packed(root / split)
    if any(batch_files(root, name) for name in ("train", "val")):
        return Downsampled(root, split)
    if is_huggingface(root):
        return HuggingFace(root, split)
    return open_folders(root, split)


class ImageDataset(Dataset):
    """Items (epoch, index) -> (levels uint8 (3, size, size), label, index). A bad image raises UserError.

    flip         mirror half of the images; fast  `fast_center_crop` instead of the ADM crop
    replace_bad  a batch takes the next image that can be read in place of a bad one (training); else it is left out
    """

    def __init__(
        self,
        source: Source,
        size: int,
        *,
        seed: int,
        flip: bool = False,
        fast: bool = False,
        replace_bad: bool = False,
    ):
        if source.img_size not in (None, size):
            raise UserError(
                f"these {source.kind} do not fit a model of {size} px; pack them with --img_size {size}"
            )
        if source.img_size and fast:
            raise UserError(f"--fast_decode does not apply to {source.kind}; leave it out")
        self.source, self.classes, self.size = source, source.classes, size
        self.seed, self.flip, self.fast, self.replace_bad = seed, flip, fast, replace_bad

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, int, int]:
        epoch, index = item
        levels = self.source.levels(index, self.size, self.fast)
        if self.flip and np.random.default_rng((self.seed, epoch, index)).random() < 0.5:
            levels = levels.flip(2)
        return levels, int(self.source.labels[index]), index

    def __getitems__(self, items: list[tuple[int, int]]) -> tuple[list, dict[int, str]]:
        """What torch's loader calls: the items of a batch, and the bad images met, number -> what is wrong."""
        batch, bad = [], {}
        for epoch, index in items:
            tries = min(BAD_IN_A_ROW, len(self)) if self.replace_bad else 1
            for number in (i % len(self) for i in range(index, index + tries)):
                try:
                    batch.append(self[epoch, number])
                    break
                except UserError as error:
                    bad[number] = str(error)
            else:
                if self.replace_bad:
                    raise UserError(f"{bad[index]} (and the {tries - 1} images after it are bad too)")
        return batch, bad


class ImageFolderDataset(ImageDataset):
    """The images of class folders in `root`."""

    def __init__(self, root: Path, size: int, flip: bool, seed: int, fast: bool = False):
        super().__init__(class_folders(root), size, seed=seed, flip=flip, fast=fast)


class BatchOrder:
    """Batches of (epoch, index) for one process: batch b of all processes together is the same for any number of them.

    shuffled   a new permutation each epoch, incomplete batches dropped; else in order, each image once
    start      how many images of the epoch all processes together have had, where a run goes on
    together   images in a batch of all processes
    """

    def __init__(self, length: int, batch_size: int, world: World, seed: int, shuffled: bool):
        self.length, self.batch_size, self.world, self.seed, self.shuffled = (
            length,
            batch_size,
            world,
            seed,
            shuffled,
        )
        self.epoch = self.start = 0
        self.together = batch_size * world.size

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.length // self.together if self.shuffled else -(-self.length // self.together)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.batches(self.epoch, self.start)  # as they are now: a generator would look at them later

    def batches(self, epoch: int, start: int) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.length)
        if self.shuffled:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
        end = self.length - (self.together - 1 if self.shuffled else 0)
        for begin in range(start, end, self.together):
            first = begin + self.world.rank * self.batch_size
            if mine := [(epoch, int(index)) for index in order[first : first + self.batch_size]]:
                yield mine


class ImageLoader(DataLoader):
    """Batches (levels uint8 (B, 3, H, H), labels (B,), indices (B,)); `batch_sampler` is the BatchOrder.

    bad        number -> what is wrong, of the bad images that this process has met
    known_bad  numbers of those that `gather_bad` has told of
    """

    def __init__(self, dataset: ImageDataset, order: BatchOrder, num_workers: int, pin_memory: bool):
        super().__init__(
            dataset,
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=ignore_in_worker,
            generator=torch.Generator(),  # else each pass would draw from the generator that training uses
        )
        self.bad: dict[int, str] = {}
        self.known_bad: set[int] = set()

    def __iter__(self) -> Iterator[Batch]:
        return self.without_bad(super().__iter__())  # workers start here, not at the first batch

    def without_bad(self, batches: Iterator[tuple[Batch | None, dict[int, str]]]) -> Iterator[Batch]:
        for batch, bad in batches:
            self.bad.update(bad)
            if batch is not None:
                yield batch

    def gather_bad(self) -> list[str]:
        """What is wrong with the bad images that any process has met since the last call, by number; on every process."""
        met = {
            number: reason for of_process in dist.gather(self.bad) for number, reason in of_process.items()
        }
        new = sorted(met.keys() - self.known_bad)
        self.known_bad.update(new)
        return [met[number] for number in new]


def collate(fetched: tuple[list, dict[int, str]]) -> tuple[Batch | None, dict[int, str]]:
    items, bad = fetched
    return tuple(default_collate(items)) if items else None, bad


def make_loader(
    dataset: ImageDataset,
    batch_size: int,
    world: World,
    *,
    shuffled: bool,
    num_workers: int,
    pin_memory: bool,
) -> ImageLoader:
    """The loader of one process's share of each epoch."""
    order = BatchOrder(len(dataset), batch_size, world, dataset.seed, shuffled)
    if len(order) == 0:
        raise UserError(
            f"batch_size {batch_size} on {world.size} process(es) is more than the {len(dataset)} training images"
        )
    return ImageLoader(dataset, order, num_workers, pin_memory)


def find_bad(source: Source, world: World, num_workers: int, progress_bar: bool = True) -> list[str]:
    """Reads every image, shared by all processes and their workers. On each of them: what is wrong with the bad ones."""
    dataset = ImageDataset(source, source.img_size or 8, seed=0)
    loader = make_loader(dataset, 32, world, shuffled=False, num_workers=num_workers, pin_memory=False)
    with tqdm(
        total=len(dataset), desc="checking", unit="image", disable=None if progress_bar else True
    ) as bar:
        for _, _, indices in loader:
            bar.update(len(indices) * world.size)
    return loader.gather_bad()
