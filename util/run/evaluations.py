"""What the evaluations of a run have shown so far."""

import math
from dataclasses import dataclass, fields

CAUGHT_UP = 1.01  # of the raw weights' bits/dim


@dataclass
class Evaluations:
    """What the evaluations of a run have shown so far. Checkpoints hold it, so that it survives a restart.

    best, best_step  the lowest bits/dim of the validation images, and the step at which they were measured
    since_best       evaluations after that one
    caught_up        whether the averaged weights have once had at most CAUGHT_UP times the bits/dim of the
                     raw ones; from then on the raw ones need no evaluation
    """

    best: float = math.inf
    best_step: int = 0
    since_best: int = 0
    caught_up: bool = False

    @classmethod
    def restored(cls, saved: dict) -> "Evaluations":
        """From a checkpoint's entry, which may lack fields. Raises an error for values of other types."""
        known = {field.name: type(field.default) for field in fields(cls)}
        return cls(**{name: kind(saved[name]) for name, kind in known.items() if name in saved})

    def note(self, step: int, bits: float, raw_bits: float | None) -> bool:
        """Notes the bits/dim of the weights that count, and of the raw ones where they were measured too.

        Returns whether the weights are the best so far.
        """
        self.caught_up |= raw_bits is not None and bits <= CAUGHT_UP * raw_bits
        is_best = bits < self.best
        if is_best:
            self.best, self.best_step = bits, step
        self.since_best = 0 if is_best else self.since_best + 1
        return is_best

    def __str__(self) -> str:
        best = f"the best, {self.best:.4f} bits/dim at step {self.best_step}"
        return f"{self.since_best} evaluation(s) after {best}"
