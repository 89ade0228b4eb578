"""Where a run's figures go: TensorBoard, a JSON-lines file, and the terminal."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from util import dist

ON_BAR = ("train/loss", "train/images_per_s")


def printable(line: str) -> str:
    """A line that standard output can show: a file's name may be no text, or none that this terminal knows."""
    encoding = sys.stdout.encoding or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


class RunLog:
    """Log of one run in `folder`; on any process but the main one, all calls do nothing.

    log.txt gets a JSON line a record; TensorBoard its numbers and images. A terminal shows a bar with loss and ETA; without
    one, records are printed as plain lines. Where the disk takes no more, training goes on without the figures.
    """

    def __init__(self, folder: Path, enabled: bool):
        self.folder, self.enabled, self.writer, self.bar = folder, enabled, None, None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            with self.though_the_disk_be_full():
                self.writer = SummaryWriter(str(folder))
            self.file = open(folder / "log.txt", "a", encoding="utf-8", buffering=1)  # noqa: SIM115  closed in close()
            self.terminal = sys.stderr.isatty()

    def start_epoch(self, epoch: int, epochs: int, steps: int, first: int) -> None:
        """The bar runs over all epochs, so that its ETA is that of the run."""
        if self.enabled and self.terminal:
            if self.bar is None:
                self.bar = tqdm(
                    total=epochs * steps, initial=epoch * steps + first, unit="step", dynamic_ncols=True
                )
            self.bar.set_description(f"epoch {epoch + 1}/{epochs}")

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def record(self, step: int, values: dict[str, float]) -> None:
        """Numbers by name at a global step; names may hold a slash for TensorBoard's groups."""
        if not self.enabled:
            return
        with self.though_the_disk_be_full():
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items() if self.writer else ():
                self.writer.add_scalar(name, value, step)
        shown = {name.removeprefix("train/"): f"{values[name]:.4g}" for name in ON_BAR if name in values}
        if self.bar is not None and shown:
            self.bar.set_postfix(shown)
        else:
            self.say(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def has(self, step: int, name: str) -> bool:
        """Whether the JSON lines hold a record of that step with that name."""
        if not self.enabled:
            return False
        lines = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        return any(line.startswith(f'{{"step": {step}, ') and f'"{name}"' in line for line in lines)

    def image(self, step: int, name: str, image) -> None:
        """An RGB Pillow image, also as <name>-<step>.png."""
        if self.enabled:
            with self.though_the_disk_be_full():
                if self.writer:
                    self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")
                image.save(self.folder / f"{name}-{step:07d}.png")

    @contextmanager
    def though_the_disk_be_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.say(f"{self.folder}: figures could not be written ({error.strerror or error})")

    def note(self, line: str) -> None:
        """A line for a person that is worth keeping: also in log.txt."""
        if self.enabled:
            with self.though_the_disk_be_full():
                self.file.write(json.dumps({"note": line}) + "\n")
            self.say(line)

    def say(self, line: str) -> None:
        """A line for a person, above the bar."""
        if self.enabled:
            tqdm.write(printable(line), file=sys.stdout)
            sys.stdout.flush()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        if self.enabled:
            if self.bar is not None:
                self.bar.close()
            with self.though_the_disk_be_full():
                self.file.close()
                if self.writer:
                    self.writer.close()


class Window:
    """Means of the loss and its terms since the last record, over the batches where the loss was finite, on the device."""

    def __init__(self, device: torch.device):
        self.names, self.sum, self.images = (), torch.zeros((), device=device), 0

    def add(self, loss: Tensor, terms: Sequence, images: int) -> None:
        """A batch: its loss, the loss's terms (with `name` and `loss`), and its number of images."""
        self.names = ("loss", *(f"loss_{term.name}" for term in terms))
        values = torch.stack([torch.ones_like(loss), loss, *(term.loss for term in terms)]).detach().float()
        self.sum = self.sum + torch.where(loss.isfinite(), values, 0.0)
        self.images += images

    def read(self) -> dict[str, float]:
        """Means over the window and over all processes; nan where there was nothing finite."""
        count, *sums = dist.mean(self.sum).tolist()
        return {
            name: total / count if count else math.nan for name, total in zip(self.names, sums, strict=True)
        }


class BadSteps:
    """Steps whose gradient was not finite, which are skipped, counted on the device."""

    def __init__(self, device: torch.device):
        # in all, in a row up to now, most in a row, first of those
        self.total, self.row, self.most, self.where = torch.zeros(
            4, dtype=torch.int64, device=device
        ).unbind()

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
    """The most memory that this process has used on `device` since this was made; on a CPU, since the process began."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)

    def gib(self) -> float:
        if self.device.type != "cpu":
            return torch.accelerator.max_memory_allocated(self.device) / 2**30
        import resource  # which Windows lacks

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            2**30 if sys.platform == "darwin" else 2**20
        )
