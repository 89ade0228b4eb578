"""What a run will do: its length, its memory, and what speaks against it, before it begins."""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from util.data.loader import ImageDataset
from util.errors import UserError
from util.pixels import shape_name

FEW_STEPS = 500
LOOKED_AT = 64  # images that `find_faults` reads
MANY = 0.05  # share of these with the same fault that is worth a warning


@dataclass(frozen=True)
class Plan:
    """What a run does.

    images   for training, and held_out: for validation
    steps    of an epoch, each of `batch` images of all processes
    faults   what is probably not meant, in a line each
    seconds  of a step, where they were measured
    gib      memory of a step of a process in float32, at most, where it was estimated
    """

    source: str
    classes: int
    images: int
    held_out: int
    epochs: int
    steps: int
    batch: int
    lr: float
    ema_decay: float | None
    faults: list[str]
    seconds: float | None = None
    gib: float | None = None

    @property
    def total(self) -> int:
        return self.epochs * self.steps

    def lines(self) -> list[str]:
        """The plan as the log has it."""
        ema = f", weights averaged with decay {self.ema_decay:g}" if self.ema_decay is not None else ""
        time = memory = ""
        if self.seconds is not None:
            time = f": about {duration(self.seconds * self.total)}, {self.seconds:.3g} s a step"
        if self.gib is not None:
            memory = f"; {self.gib:.2g} GiB a step in float32"
        return [
            f"{self.source}, {self.classes} classes, {self.images} + {self.held_out} images",
            f"{self.epochs} epochs of {self.steps} steps, {self.total} steps of {self.batch} images{time}; "
            f"learning rate {self.lr:.3g}{ema}{memory}",
            *(f"warning: {fault}" for fault in self.faults),
        ]


def make_plan(args: argparse.Namespace, train: ImageDataset, val: ImageDataset, processes: int) -> Plan:
    """The plan of a run. It looks at some of the training images."""
    kinds = " and ".join(dict.fromkeys(data.source.kind for data in (train, val)))
    steps = len(train) // (args.batch_size * processes) // args.accum_iter
    return Plan(
        source=f"{args.data_path}: {kinds}", classes=len(train.classes), images=len(train),
        held_out=len(val), epochs=args.epochs, steps=steps,
        batch=args.batch_size * args.accum_iter * processes, lr=args.lr,
        ema_decay=args.ema_decay if args.ema else None, faults=find_faults(args, train, steps),
    )  # fmt: skip


def find_faults(args: argparse.Namespace, data: ImageDataset, steps: int) -> list[str]:
    """Says in a line each what is probably not meant, in the settings and in the training images.

    It reads up to LOOKED_AT images, evenly spaced. `steps` are those of an epoch.
    """
    faults, total = [], steps * args.epochs
    if not steps:
        faults.append(
            f"a step has more images than the {len(data)} for training: give a smaller --batch_size"
        )
    elif total < FEW_STEPS:
        faults.append(f"{total} steps are few: images take shape after some hundreds; give more --epochs")
    if args.ema and (average := 1 / max(1e-9, 1 - args.ema_decay)) > total:
        faults.append(
            f"--ema_decay {args.ema_decay:g} averages over {average:,.0f} steps, but the run has {total:,}: "
            "the average is one over the last tenth of them, by its warm-up"
        )
    if args.class_num > 1 and np.ptp(data.source.labels) == 0:
        faults.append(f"all training images are of one of {args.class_num} classes: guidance cannot work")
    return faults + _bad_images(data)


def _bad_images(data: ImageDataset) -> list[str]:
    count = data.source.first_look or len(data)
    numbers, plain, small = np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(int), [], []
    for number in numbers.tolist():
        try:
            image = data.source.cells(number, data.shape, data.alphabet)
            sides = data.shape if data.source.shape else data.source.image(number).size[::-1]
        except UserError:  # it is named when training meets it
            continue
        if image.amin() == image.amax():
            plain.append(number)
        if any(side < wanted for side, wanted in zip(sides, data.shape, strict=True)):
            small.append((min(sides), number))
    faults = []
    if len(plain) > MANY * len(numbers):
        name = data.source.name(plain[0])
        faults.append(f"{len(plain)} of {len(numbers)} images looked at are of one value, such as {name}")
    if len(small) > MANY * len(numbers):
        side, number = min(small)
        faults.append(
            f"{len(small)} of {len(numbers)} images looked at are enlarged to {shape_name(data.shape)} px, "
            f"such as {data.source.name(number)} of {side}: bits/dim are then not those of your images"
        )
    return faults


def measure(step: Callable[[int], None], batch_size: int, patience: float = 4.0) -> float:
    """Measures `step(n)`, a training step on n images, and returns the seconds for `batch_size` images.

    It doubles n from 1 until that is the batch, or steps take longer than `patience` seconds, or there is no
    memory for more; then it takes the time to be proportional to n. The median of three steps counts, or of
    as many as that time allows.
    """
    images, seconds = 1, math.inf
    while True:
        times: list[float] = []
        try:
            while len(times) < 4 and sum(times) < patience:
                began = time.perf_counter()
                step(images)
                times.append(time.perf_counter() - began)
        except torch.OutOfMemoryError:
            if seconds == math.inf:
                raise
            return seconds
        # The first step of a size warms up.
        seconds = float(np.median(times[1:] or times)) * batch_size / images
        if images >= batch_size or sum(times) >= patience:
            return seconds
        images = min(2 * images, batch_size)


def free_gib(device: torch.device) -> float:
    """Memory that is free on a device, in GiB; infinite where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    if device.type == "cpu" and Path("/proc/meminfo").exists():  # Linux
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20
    return math.inf


def duration(seconds: float) -> str:
    """A time as people say it: "40 s", "12 min", "3.2 hours"."""
    for limit, unit, name in ((100, 1, "s"), (100 * 60, 60, "min"), (math.inf, 3600, "hours")):
        if seconds < limit:
            return f"{seconds / unit:.{int(unit == 3600)}f} {name}"
    raise ValueError(seconds)
