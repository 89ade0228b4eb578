"""Random changes of training images. Validation and evaluation never see them, so bits/dim stay honest."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from util.errors import UserError


@dataclass(frozen=True)
class Augmentation:
    """Random flips and shifts, which are functions of (seed, epoch, image number).

    flip   mirrors half of the images, left to right
    shift  moves each image by up to so many cells along each axis. Its edge is repeated where it leaves a gap
    """

    flip: bool = False
    shift: int = 0

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises UserError if a shift could leave less than half of a grid along its shortest axis."""
        if self.shift > (size := min(shape)) // 2:
            raise UserError(f"--shift {self.shift} must be from 0 to {size // 2}, half of {size} pixels")

    def __call__(self, values: Tensor, seed: int, epoch: int, index: int) -> Tensor:
        """Changes image number `index`: values (C, *shape) -> the same shape and dtype."""
        if not (self.flip or self.shift):
            return values
        rng = np.random.default_rng((seed, epoch, index))
        if self.flip and rng.random() < 0.5:
            values = values.flip(-1)
        if self.shift:
            moved = rng.integers(-self.shift, self.shift, size=values.dim() - 1, endpoint=True)
            for axis, by in enumerate(moved.tolist(), 1):
                last = values.shape[axis] - 1
                values = values.index_select(axis, torch.arange(last + 1).sub(by).clamp(0, last))
        return values
