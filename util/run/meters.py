"""The figures of a run: where they are written, and how they are collected without waiting for the device."""

import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from util import dist

ON_BAR = ("train/loss", "train/images_per_s", "train/memory_gib")
LINE_EVERY = 30.0  # seconds between two lines on the progress, where there is no terminal


def printable(line: str) -> str:
    """Escapes what standard output cannot show, such as letters of a file's name outside its encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


class EventFile:
    """A file of events for TensorBoard, written at once and by no thread, so that errors reach the caller."""

    def __init__(self, folder: Path):
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        # What the disk refuses stays in the buffer, and a later flush goes on with it.
        self.file = (folder / name).open("ab", buffering=2**20)
        self.records = RecordWriter(self.file)
        self.add(file_version="brain.Event:2")

    def add(self, **content) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self.records.write(Event(wall_time=time.time(), **content).SerializeToString())
        self.file.flush()


class ProgressLines:
    """Says a line on the progress of a run every LINE_EVERY seconds, where no terminal can show a bar.

    say          called with a line
    done, total  steps of the run
    """

    def __init__(self, say: Callable[[str], None], done: int, total: int):
        self.say, self.first, self.done, self.total = say, done, done, total
        self.began = self.spoken = time.monotonic()
        self.images, self.loss, self.silent, self.memory = 0, None, True, ""

    def step(self, loss: Tensor, images: int) -> None:
        """Notes a step, its loss and its number of images."""
        self.done, self.images = self.done + 1, self.images + images
        if time.monotonic() - self.spoken >= LINE_EVERY:
            self._speak(loss.item() if self.loss is None else self.loss)  # sync

    def record(self, loss: float, gib: float | None) -> None:
        """Notes the mean loss of the last steps and the most memory, for the next line.

        The first and the last are lines now.
        """
        self.loss, self.memory = loss, "" if gib is None else f", {gib:.2g} GiB"
        if self.images and (self.silent or self.done == self.total):
            self._speak(loss)

    def _speak(self, loss: float) -> None:
        now = time.monotonic()
        rate = self.images / max(now - self.spoken, 1e-9)
        left = (self.total - self.done) * (now - self.began) / max(self.done - self.first, 1)
        place = f"step {self.done} of {self.total}, loss {loss:.4g}"
        self.say(f"{place}, {rate:.3g} images/s, {tqdm.format_interval(left)} left{self.memory}")
        self.spoken, self.images, self.loss, self.silent = now, 0, None, False


class RunLog(AbstractContextManager):
    """The log of one run in `folder`, which may be None: then it prints, but writes nothing.

    Its calls do nothing unless `enabled`, as on the first process. Each record is a JSON line in log.txt;
    numbers and images also go to TensorBoard. A terminal shows a bar with loss and remaining time, and
    without a terminal lines say the same (ProgressLines). If the disk is full, training continues: one line
    says so, and what is missing is written as soon as there is room.
    """

    def __init__(self, folder: Path | None, enabled: bool):
        self.folder, self.enabled, self.bar, self.lines = folder, enabled, None, None
        self.file = self.events = None
        self.has_failed = False
        if enabled:
            self.terminal = sys.stderr.isatty()
            with self.tolerate_write_errors():
                if folder is not None:
                    self.file = (folder / "log.txt").open("a", encoding="utf-8", buffering=1)
                    self.events = EventFile(folder)

    def start_epoch(self, epoch: int, epochs: int, steps: int, first: int) -> None:
        """Begins an epoch of `steps` at step `first`. The bar and its remaining time cover all epochs."""
        done, total = epoch * steps + first, epochs * steps
        if self.enabled and self.terminal:
            if self.bar is None:
                self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)
            self.bar.set_description(f"epoch {epoch + 1}/{epochs}")
        elif self.enabled and self.lines is None:
            self.lines = ProgressLines(self.say, done, total)

    def step(self, loss: Tensor, images: int) -> None:
        """Notes a step, its loss on this process, and its images on all processes."""
        if self.bar is not None:
            self.bar.update()
        elif self.lines is not None:
            self.lines.step(loss, images)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Writes figures of a global step by name. A slash in a name makes a group in TensorBoard."""
        if not self.enabled:
            return
        self.write({"step": step, **values})
        if self.events is not None:
            from torch.utils.tensorboard import summary

            with self.tolerate_write_errors():
                for name, value in values.items():
                    self.events.add(step=step, summary=summary.scalar(name, value))
        shown = {name.removeprefix("train/"): f"{values[name]:.4g}" for name in ON_BAR if name in values}
        if self.bar is not None and shown:
            self.bar.set_postfix(shown)
        elif self.lines is not None and "train/loss" in values:
            self.lines.record(values["train/loss"], values.get("train/memory_gib"))
        else:
            self.say(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def find(self, step: int, name: str) -> dict[str, float] | None:
        """The last record of that step with that name in log.txt, or None."""
        if self.file is None:
            return None
        for line in reversed((self.folder / "log.txt").read_text("utf-8", errors="replace").splitlines()):
            if line.startswith(f'{{"step": {step}, ') and f'"{name}"' in line:
                with suppress(ValueError):  # a line that was cut short
                    return json.loads(line)
        return None

    def image(self, step: int, name: str, image) -> None:
        """Writes an RGB Pillow image to TensorBoard and to <name>/step-<step>.png."""
        if self.enabled and self.folder is not None:
            from torch.utils.tensorboard import summary

            with self.tolerate_write_errors():
                path = self.folder / name / f"step-{step:07d}.png"
                path.parent.mkdir(exist_ok=True)
                image.save(path)
                if self.events is not None:
                    shown = summary.image(name, np.asarray(image), dataformats="HWC")
                    self.events.add(step=step, summary=shown)

    @contextmanager
    def tolerate_write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.has_failed:
                self.say(f"{self.folder}: figures could not be written ({error.strerror or error})")
            self.has_failed = True

    def write(self, entry: dict) -> None:
        """Writes an entry as a line of log.txt."""
        if self.file is not None:
            with self.tolerate_write_errors():
                self.file.write(json.dumps(entry) + "\n")

    def note(self, line: str) -> None:
        """Prints a line and keeps it in log.txt."""
        if self.enabled:
            self.write({"note": line})
            self.say(line)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self.enabled:
            tqdm.write(printable(line), file=sys.stdout)
            sys.stdout.flush()

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for file in (self.file, self.events and self.events.file):
            if file is not None:
                with self.tolerate_write_errors():
                    file.close()


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
