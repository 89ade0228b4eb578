"""Tells from the losses of a run whether it goes well."""

import math
from collections import deque
from statistics import median

import torch
from torch import Tensor

from util import dist
from util.errors import UserError


class Diverged(UserError):
    """The loss of a run is not finite or far above what it was, for too long."""


class LossWatch:
    """Judges the loss of every step against those before it, without waiting for the device at each step.

    A step is bad if it was skipped because its loss or gradient was not finite, or if its loss is above
    `limit`. The limit is well above what random batches and masks do to the loss; the constants were chosen
    by the runs in docs/log.md. All processes judge the mean of their losses, so they all come to the same.

    losses    the last losses. Of a row of bad ones only the first is among them, as if it were the limit:
              so a loss that stays high is not taken for normal, and rare high ones are not left out
    followed  whether the first step was good since this was set to None; None before that step
    """

    RECENT = 500  # losses whose median is the measure
    FEW = 20  # losses; with fewer, the loss may still change steeply
    SHORT, LONG = 20, 200  # steps

    def __init__(self):
        self.pending, self.losses, self.bad = [], deque(maxlen=self.RECENT), deque(maxlen=self.LONG)
        self.skipped = self.row = self.longest_row = self.row_began = 0
        self.followed = None

    def note(self, loss: Tensor, grad_norm: Tensor, step: int) -> None:
        """Notes the loss and the norm of the gradient of a global step."""
        self.pending.append((step, torch.where(grad_norm.isfinite(), loss.detach(), math.nan)))

    def read(self) -> None:
        """Judges the steps that were noted since the last call. Waits for the device."""
        if self.pending:
            steps, losses = zip(*self.pending, strict=True)
            self.pending = []
            for step, loss in zip(steps, dist.mean(torch.stack(losses)).tolist(), strict=True):  # sync
                self._judge(step, loss)

    def _judge(self, step: int, loss: float) -> None:
        skipped, limit = not math.isfinite(loss), self.limit
        bad = skipped or loss > limit
        if not skipped and not (bad and self.is_bad):
            self.losses.append(min(loss, limit))
        self.skipped += skipped
        self.row = self.row + 1 if skipped else 0
        if self.row > self.longest_row:
            self.longest_row, self.row_began = self.row, step + 1 - self.row
        self.bad.append(bad)
        if self.followed is None:
            self.followed = not bad

    @property
    def limit(self) -> float:
        """The highest loss, in nats, that counts as normal."""
        factor = 1.5 if len(self.losses) >= self.FEW else 10
        return factor * median(self.losses) + 0.5 if self.losses else math.inf

    @property
    def is_bad(self) -> bool:
        """Whether the last step was bad."""
        return bool(self.bad) and self.bad[-1]

    def check(self, max_bad_steps: int, place: str, ended: bool) -> None:
        """Raises Diverged if the run is to be given up.

        This is so after more than `max_bad_steps` skipped steps in a row, of which the longest row began at
        `place`; when more than half of LONG steps were bad, and more than `max_bad_steps`; and when the run
        has `ended` and more than half of its last SHORT steps were bad.
        """
        if self.longest_row > max_bad_steps:
            raise Diverged(
                f"the loss or its gradient was not finite in {self.longest_row} steps in a row "
                f"(--max_bad_steps {max_bad_steps}), from {place}, on; they changed no weight"
            )
        last = list(self.bad)[-self.SHORT :]
        if sum(self.bad) > max(self.LONG / 2, max_bad_steps) or (ended and sum(last) > len(last) / 2):
            above = f" or far above its recent median of {median(self.losses):.3g}" if self.losses else ""
            raise Diverged(
                f"in {sum(self.bad)} of the last {len(self.bad)} steps the loss was not finite{above}"
            )
