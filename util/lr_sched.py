"""Learning rate: linear warm-up, then cosine or constant, from the fractional epoch (SPEC section 6)."""

import math

SCHEDULES = ("cosine", "constant")


def learning_rate(
    epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float, schedule: str
) -> float:
    """The rate at `epoch` (fractional, from 0 to `epochs`)."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    if schedule == "constant":
        return lr
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
