"""Loads the values of the images of any source, in an order that can be repeated.

The order of an epoch, each random flip and shift, and the substitute for an image that cannot be read are
functions of (seed, epoch, image number), as long as no shard is lost. They do not depend on the number of
processes or workers. The values are normalised later, on the device (util/pixels.py).
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from util import dist
from util.data.arrays import open_arrays
from util.data.augment import Augmentation
from util.data.downsampled import Downsampled, batch_files
from util.data.folders import open_folders
from util.data.huggingface import HuggingFace, is_huggingface
from util.data.idx import Idx, idx_folder
from util.data.packed import Packed, is_pack
from util.data.shards import Full, location
from util.data.source import Source
from util.dist import World
from util.errors import UserError
from util.pixels import Alphabet
from util.run.signals import ignore_in_worker

MAX_BAD_IN_A_ROW = 100  # so many mean that the disk is gone, not that the images are bad
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def open_split(root: Path | str, split: str) -> Source:
    """Lists "train" or "val" of the data set in `root`, of any known kind. Raises UserError for others.
    A text with "://" is an address of fsspec, which must have a pack in shards.
    """
    root = location(root)
    if isinstance(root, str):
        return Packed(f"{root}/{split}")
    if is_pack(root / split):
        return Packed(root / split)
    if folder := idx_folder(root):
        return Idx(folder, split)
    if arrays := open_arrays(root, split):
        return arrays
    if any(batch_files(root, name) for name in ("train", "val")):
        return Downsampled(root, split)
    if is_huggingface(root):
        return HuggingFace(root, split)
    return open_folders(root, split)


class ImageDataset(Dataset):
    """Maps (epoch, index) to (values (C, *shape) of the alphabet's dtype, label, index).

    flip, shift  random changes, see Augmentation; what can_mirror denies is not mirrored
    training     a batch takes the next readable image in place of a bad one; otherwise it leaves it out

    Raises UserError where the source has no values of this shape and alphabet.
    """

    def __init__(
        self, source: Source, shape: tuple[int, ...], alphabet: Alphabet, *, seed: int, flip: bool = False,
        shift: int = 0, training: bool = False,
    ):  # fmt: skip
        source.check(shape, alphabet)
        self.source, self.classes, self.shape, self.alphabet = source, source.classes, shape, alphabet
        self.seed, self.training, self.checking = seed, training, False
        self.augment = Augmentation(flip and source.can_mirror, shift)
        self.augment.check(shape)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, int, int]:
        """Raises UserError for an image that cannot be read."""
        epoch, index = item
        cells = self.source.cells(index, self.shape, self.alphabet)
        values = self.augment(cells, self.seed, epoch, index)
        return values, int(self.source.labels[index]), index

    def __getitems__(self, items: list[tuple[int, int]]) -> tuple[list, dict[int, str]]:
        """Returns the items of a batch, and the errors of bad images by number. torch's loader calls this.

        In training, images that are lost with their shard count as one, with the number of the first; so they
        do if `checking`. Otherwise, as in an evaluation, UserError is raised, since many would be left out.
        """
        batch, bad = [], {}
        for epoch, index in items:
            tries = min(MAX_BAD_IN_A_ROW, len(self)) if self.training else 1
            number, first = index, None
            for _ in range(tries):
                try:
                    batch.append(self[epoch, number])
                    break
                except Full as error:
                    raise UserError(str(error)) from error
                except UserError as error:
                    lost = getattr(error, "images", range(number, number + 1))
                    if hasattr(error, "images") and not (self.training or self.checking):
                        raise
                    bad[lost.start], first = str(error), first or str(error)
                    number = (number + len(lost)) % len(self)
            else:
                if self.training:
                    raise UserError(f"{first} (and the {tries - 1} images after it are bad too)")
        return batch, bad


def open_dataset(
    root: Path | str, split: str, shape: tuple[int, ...], alphabet: Alphabet, *, class_num: int | None,
    seed: int, flip: bool, shift: int, strict: bool, world: World, num_workers: int,
) -> ImageDataset:  # fmt: skip
    """Opens the "train" or "val" images in `root` for a model of this shape and alphabet with `class_num`
    classes.

    class_num    None: as many as there are
    flip, shift  change training images at random, see Augmentation
    strict       reads every image first, and raises UserError where one is bad

    Raises UserError where the number of classes is another, or the data do not fit shape and alphabet.
    """
    source, training = open_split(root, split), split == "train"
    changes = {"flip": flip, "shift": shift} if training else {}
    dataset = ImageDataset(source, shape, alphabet, seed=seed, training=training, **changes)
    if (found := len(source.classes)) != class_num and class_num is not None:
        what = f"{root}: {split} ({source.kind}) has {found} classes but --class_num is {class_num}"
        raise UserError(what if found else f"{what}; give --class_num 0 for an unconditional model")
    if strict and (bad := find_bad(dataset, world, num_workers, world.is_main)):
        raise UserError(f"--strict_data: {len(bad)} bad image(s) in {split}, the first: {bad[0]}")
    return dataset


class BatchOrder:
    """The batches of (epoch, index) of one process.

    Batch number b of all processes together is the same for any number of processes.

    shuffled   each epoch is a new permutation, without an incomplete batch at its end; otherwise each image
               comes once, in order
    epoch      the epoch to iterate over next
    start      how many images of that epoch all processes together have already had
    together   images in a batch of all processes together
    """

    def __init__(self, length: int, batch_size: int, world: World, seed: int, shuffled: bool):
        self.length, self.batch_size, self.world = length, batch_size, world
        self.seed, self.shuffled = seed, shuffled
        self.epoch = self.start = 0
        self.together = batch_size * world.size

    def __len__(self) -> int:
        """The number of batches in a whole epoch."""
        return self.length // self.together if self.shuffled else -(-self.length // self.together)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # This is no generator function, so that it reads the attributes now, before the caller changes them.
        epoch, order, end = self.epoch, np.arange(self.length), self.length
        offset = self.world.rank * self.batch_size
        if self.shuffled:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
            end = self.length - self.together + 1 + offset
        starts = range(self.start + offset, end, self.together)
        return ([(epoch, int(index)) for index in order[i : i + self.batch_size]] for i in starts)


class ImageLoader(DataLoader):
    """Iterates over batches: values (B, C, *shape), labels (B,) and indices (B,).

    `batch_sampler` is the BatchOrder.

    bad        the errors of the bad images that this process has met, by number
    known_bad  the numbers of the bad images that `gather_bad` has returned
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
            generator=torch.Generator(),  # otherwise each pass would draw from torch's global generator
        )
        self.bad: dict[int, str] = {}
        self.known_bad: set[int] = set()

    def __iter__(self) -> Iterator[Batch]:
        return self.without_bad(super().__iter__())  # this starts the workers now, not at the first batch

    def without_bad(self, batches: Iterator[tuple[Batch | None, dict[int, str]]]) -> Iterator[Batch]:
        for batch, bad in batches:
            self.bad.update(bad)
            if batch is not None:
                yield batch

    def gather_bad(self) -> list[str]:
        """The errors of the bad images that any process has met since the last call, on every process."""
        met = {number: error for bad in dist.gather(self.bad) for number, error in bad.items()}
        new = sorted(met.keys() - self.known_bad)
        self.known_bad.update(new)
        return [met[number] for number in new]

    def report_bad(self, say: Callable[[str], None]) -> int:
        """Names the bad images that were met since the last call. Returns how many there are by now."""
        new = self.gather_bad()
        for number, line in enumerate(new, len(self.known_bad) - len(new) + 1):
            say(f"bad image {number}, skipped: {line}")
        return len(self.known_bad)


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
    """Makes the loader of this process's share of each epoch. `batch_size` counts images per process."""
    order = BatchOrder(len(dataset), batch_size, world, dataset.seed, shuffled)
    if len(order) == 0:
        raise UserError(
            f"batch_size {batch_size} on {world.size} process(es) is more than the {len(dataset)} training "
            "images"
        )
    return ImageLoader(dataset, order, num_workers, pin_memory)


def find_bad(dataset: ImageDataset, world: World, num_workers: int, progress_bar: bool = True) -> list[str]:
    """Reads every image, shared among all processes. Returns the errors of the bad ones, on each process."""
    dataset = copy.copy(dataset)
    dataset.training, dataset.checking = False, True
    loader = make_loader(dataset, 32, world, shuffled=False, num_workers=num_workers, pin_memory=False)
    hidden = None if progress_bar else True  # None: hidden unless there is a terminal
    with tqdm(total=len(dataset), desc="checking", unit="image", disable=hidden) as bar:
        for _, _, indices in loader:
            bar.update(len(indices) * world.size)
    return loader.gather_bad()
