"""The figures of a run: where they are written, and how they are collected without waiting for the device."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from util import dist

ON_BAR = ("train/loss", "train/images_per_s")


def printable(line: str) -> str:
    """Escapes what standard output cannot show, such as letters of a file's name outside its encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


class RunLog(AbstractContextManager):
    """The log of one run in `folder`. Its calls do nothing unless `enabled`, as on the first process.

    Each record is a JSON line in log.txt; numbers and images also go to TensorBoard. A terminal shows a bar
    with loss and remaining time, and without a terminal the records are printed as lines. If the disk is
    full, training continues without figures.
    """

    def __init__(self, folder: Path, enabled: bool):
        self.folder, self.enabled, self.writer, self.bar = folder, enabled, None, None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            with self.tolerate_write_errors():
                self.writer = SummaryWriter(str(folder))
            self.file = (folder / "log.txt").open("a", encoding="utf-8", buffering=1)
            self.terminal = sys.stderr.isatty()

    def start_epoch(self, epoch: int, epochs: int, steps: int, first: int) -> None:
        """Begins an epoch of `steps` at step `first`. The bar and its remaining time cover all epochs."""
        if self.enabled and self.terminal:
            if self.bar is None:
                done = epoch * steps + first
                self.bar = tqdm(total=epochs * steps, initial=done, unit="step", dynamic_ncols=True)
            self.bar.set_description(f"epoch {epoch + 1}/{epochs}")

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def record(self, step: int, values: dict[str, float]) -> None:
        """Writes figures of a global step by name. A slash in a name makes a group in TensorBoard."""
        if not self.enabled:
            return
        with self.tolerate_write_errors():
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items() if self.writer else ():
                self.writer.add_scalar(name, value, step)
        shown = {name.removeprefix("train/"): f"{values[name]:.4g}" for name in ON_BAR if name in values}
        if self.bar is not None and shown:
            self.bar.set_postfix(shown)
        else:
            self.say(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def has(self, step: int, name: str) -> bool:
        """Whether log.txt has a record of that step with that name."""
        if not self.enabled:
            return False
        lines = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        return any(line.startswith(f'{{"step": {step}, ') and f'"{name}"' in line for line in lines)

    def image(self, step: int, name: str, image) -> None:
        """Writes an RGB Pillow image to TensorBoard and to <name>-<step>.png."""
        if self.enabled:
            with self.tolerate_write_errors():
                if self.writer:
                    self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")
                image.save(self.folder / f"{name}-{step:07d}.png")

    @contextmanager
    def tolerate_write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.say(f"{self.folder}: figures could not be written ({error.strerror or error})")

    def note(self, line: str) -> None:
        """Prints a line and keeps it in log.txt."""
        if self.enabled:
            with self.tolerate_write_errors():
                self.file.write(json.dumps({"note": line}) + "\n")
            self.say(line)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self.enabled:
            tqdm.write(printable(line), file=sys.stdout)
            sys.stdout.flush()

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        if self.enabled:
            if self.bar is not None:
                self.bar.close()
            with self.tolerate_write_errors():
                self.file.close()
                if self.writer:
                    self.writer.close()


class Window:
    """Sums the loss and its terms on the device since the last record, over batches with a finite loss."""

    def __init__(self, device: torch.device):
        self.names, self.sum, self.images = (), torch.zeros((), device=device), 0

    def add(self, loss: Tensor, terms: Sequence, images: int) -> None:
        """Adds a batch: its loss, the loss's terms (with `name` and `loss`), and its number of images."""
        self.names = ("loss", *(f"loss_{term.name}" for term in terms))
        values = torch.stack([torch.ones_like(loss), loss, *(term.loss for term in terms)]).detach().float()
        self.sum = self.sum + torch.where(loss.isfinite(), values, 0.0)
        self.images += images

    def read(self) -> dict[str, float]:
        """The means over the window and all processes; nan if no loss was finite. Waits for the device."""
        count, *sums = dist.mean(self.sum).tolist()  # sync
        means = (total / count if count else math.nan for total in sums)
        return dict(zip(self.names, means, strict=True))


class BadSteps:
    """Counts, on the device, the steps that were skipped because their gradient was not finite."""

    def __init__(self, device: torch.device):
        # all such steps; those in a row up to now; the longest row; the step with which the longest row began
        zeros = torch.zeros(4, dtype=torch.int64, device=device)
        self.total, self.row, self.most, self.where = zeros.unbind()

    def note(self, grad_norm: Tensor, step: int) -> None:
        bad = ~grad_norm.isfinite()
        self.total = self.total + bad
        self.row = (self.row + 1) * bad
        self.where = torch.where(self.row > self.most, step + 1 - self.row, self.where)
        self.most = torch.maximum(self.most, self.row)

    def skipped(self) -> int:
        return int(self.total)

    def most_in_a_row(self) -> int:
        return int(self.most)

    def first(self) -> int:
        """The step with which the longest row began."""
        return int(self.where)


class PeakMemory:
    """The most memory this process has used on `device` since this was made; on a CPU, since it began."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)

    def gib(self) -> float:
        if self.device.type != "cpu":
            return torch.accelerator.max_memory_allocated(self.device) / 2**30
        import resource  # Windows does not have it

        unit = 1 if sys.platform == "darwin" else 2**10  # bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
