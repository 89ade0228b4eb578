"""Where a run's figures go: TensorBoard, a JSON-lines file, and the terminal."""

import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

ON_BAR = ("train/loss", "train/images_per_s")


def printable(line: str) -> str:
    """A line that standard output can show: a file's name may be no text, or none that this terminal knows."""
    encoding = sys.stdout.encoding or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


class RunLog:
    """Log of one run in `folder`; on any process but the main one, all calls do nothing.

    log.txt gets a JSON line a record; TensorBoard its numbers and pictures. A terminal shows a bar with loss and ETA; without
    one, records are printed as plain lines.
    """

    def __init__(self, folder: Path, enabled: bool):
        self.enabled, self.writer, self.bar = enabled, None, None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder))
            self.file = open(folder / "log.txt", "a", encoding="utf-8", buffering=1)  # noqa: SIM115  closed in close()
            self.terminal = sys.stderr.isatty()

    def start_epoch(self, epoch: int, epochs: int, steps: int, first: int) -> None:
        """The bar runs over all epochs, so that its ETA is that of the run."""
        if self.enabled and self.terminal:
            if self.bar is None:
                self.bar = tqdm(total=epochs * steps, initial=epoch * steps + first, unit="step", dynamic_ncols=True)
            self.bar.set_description(f"epoch {epoch + 1}/{epochs}")

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def record(self, step: int, values: dict[str, float]) -> None:
        """Numbers by name at a global step; names may hold a slash for TensorBoard's groups."""
        if not self.enabled:
            return
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        shown = {name.removeprefix("train/"): f"{values[name]:.4g}" for name in ON_BAR if name in values}
        if self.bar is not None and shown:
            self.bar.set_postfix(shown)
        else:
            self.say(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def picture(self, step: int, name: str, picture) -> None:
        """An RGB Pillow picture."""
        if self.enabled:
            self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def note(self, line: str) -> None:
        """A line for a person that is worth keeping: also in log.txt."""
        if self.enabled:
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
            self.writer.close()
            self.file.close()
