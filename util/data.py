"""Image folders: `train/` and `val/` with a folder per class, as uint8 crops, in an order that anyone can repeat.

The order of an epoch and every random flip are functions of (seed, epoch, picture number), whatever the number of
processes or workers. Normalising happens on the device (util/pixels.py).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from util.crop import center_crop_arr, fast_center_crop
from util.dist import World
from util.errors import UserError
from util.signals import ignore_in_worker


def open_rgb(path: str | Path, at_least: int | None = None) -> Image.Image:
    """Any picture file -> RGB, 8 bits, upright, transparency over white. Raises UserError that names the file.

    A JPEG is decoded at a half, a quarter or an eighth of its size, where its short side stays `at_least` so long.
    """
    try:
        with Image.open(path) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as a picture ({reason}); replace or remove the file") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any Pillow mode -> RGB, 8 bits; 16-bit values are scaled, transparency is laid over white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode.startswith("I") else 255  # Pillow opens 16-bit greys as "I;16" or "I"
        levels = np.round(values.clip(0, top) * (255 / top)).astype(np.uint8)
        return Image.fromarray(levels).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


class PictureFolder(Dataset):
    """Items (epoch, index) -> (levels uint8 (3, size, size), label, index).

    flip  mirror half of the pictures; fast  `fast_center_crop` instead of the ADM crop
    """

    def __init__(self, root: Path, size: int, flip: bool, seed: int, fast: bool = False):
        folder = scan(root)
        self.samples, self.classes = folder.samples, folder.classes
        self.size, self.flip, self.seed, self.fast = size, flip, seed, fast

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, int, int]:
        epoch, index = item
        path, label = self.samples[index]
        if self.fast:
            levels = fast_center_crop(open_rgb(path, at_least=2 * self.size), self.size)
        else:
            levels = torch.from_numpy(np.array(center_crop_arr(open_rgb(path), self.size))).permute(2, 0, 1).contiguous()
        if self.flip and np.random.default_rng((self.seed, epoch, index)).random() < 0.5:
            levels = levels.flip(2)
        return levels, label, index


def scan(root: Path) -> ImageFolder:
    """Lists a folder of class folders, or raises UserError saying what is missing."""
    layout = "--data_path must hold train/ and val/, each with a folder of pictures for every class"
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; {layout}")
    try:
        return ImageFolder(str(root))
    except FileNotFoundError as error:
        raise UserError(f"{root}: {str(error).splitlines()[0].rstrip('.')}; {layout}") from error


class BatchOrder:
    """Batches of (epoch, index) for one process: batch b of all processes together is the same for any number of them.

    shuffled   a new permutation each epoch, incomplete batches dropped; else in order, each picture once
    start      how many pictures of the epoch all processes together have had, where a run goes on
    together   pictures in a batch of all processes
    """

    def __init__(self, length: int, batch_size: int, world: World, seed: int, shuffled: bool):
        self.length, self.batch_size, self.world, self.seed, self.shuffled = length, batch_size, world, seed, shuffled
        self.epoch = self.start = 0
        self.together = batch_size * world.size

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.length // self.together if self.shuffled else -(-self.length // self.together)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.length)
        if self.shuffled:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        end = self.length - (self.together - 1 if self.shuffled else 0)
        for begin in range(self.start, end, self.together):
            first = begin + self.world.rank * self.batch_size
            if mine := [(self.epoch, int(index)) for index in order[first : first + self.batch_size]]:
                yield mine


def make_loader(
    dataset: PictureFolder, batch_size: int, world: World, *, shuffled: bool, num_workers: int, pin_memory: bool
) -> DataLoader:
    """Batches (levels uint8 (B, 3, H, H), labels (B,), indices (B,)); `loader.batch_sampler` is the BatchOrder."""
    order = BatchOrder(len(dataset), batch_size, world, dataset.seed, shuffled)
    if len(order) == 0:
        raise UserError(
            f"batch_size {batch_size} on {world.size} process(es) is more than the {len(dataset)} training pictures"
        )
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_in_worker,
        generator=torch.Generator(),  # else each pass would draw from the generator that training uses
    )
