"""How a run trains, and when it evaluates, saves and ends."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from util.run.watch import LossWatch

# progress after the warm-up, 0..1 -> share of the rate above min_lr
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. `lr` is that of all weights; epochs may be fractions.

    optimizer      "adamw", the published one, or "muon" (see util/run/optimizer.py)
    ema_decay      keeps an exponential moving average of the weights; None: none
    max_bad_steps  so many steps in a row may be skipped because loss or gradient is not finite
    """

    lr: float
    min_lr: float
    lr_schedule: str
    warmup_epochs: float
    epochs: int
    grad_clip: float
    optimizer: str = "adamw"
    accum_iter: int = 1
    weight_decay: float = 0.05
    ema_decay: float | None = None
    max_bad_steps: int = 20

    def learning_rate(self, epoch: float) -> float:
        """The rate at a fractional epoch: linear warm-up, then the schedule."""
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        progress = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return self.min_lr + (self.lr - self.min_lr) * LR_SCHEDULES[self.lr_schedule](progress)

    def check(self, watch: LossWatch, steps: int, ended: bool = False) -> None:
        """Raises Diverged if the losses are bad (`LossWatch.check`); `steps` are those of an epoch."""
        epoch, step = divmod(watch.row_began, steps)
        rate = self.learning_rate(epoch + step / steps)
        place = f"epoch {epoch}, step {step} of {steps}, learning rate {rate:.3g}"
        watch.check(self.max_bad_steps, place, ended)


@dataclass(frozen=True)
class SavePolicy:
    """When a run evaluates, saves and ends, in epochs and in steps, and how many checkpoints it keeps.

    patience       ends the run after so many evaluations without a better bits/dim; None: never
    on_save_error  "continue" or "stop", where a checkpoint cannot be written
    """

    eval_freq: int
    save_last_freq: int
    save_every_steps: int | None
    keep_last: int
    on_save_error: str
    patience: int | None
