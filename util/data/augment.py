"""Random changes of training images. Validation and evaluation never see them, so bits/dim stay honest."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from util.errors import UserError


@dataclass(frozen=True)
class Augmentation:
    """Random flips and shifts, which are functions of (seed, epoch, image number).

    flip   mirrors half of the images
    shift  moves each image by up to so many pixels along each axis. Its edge pixels are repeated where it
           leaves a gap
    """

    flip: bool = False
    shift: int = 0

    def check(self, size: int) -> None:
        """Raises UserError if a shift could leave less than half of an image of `size` pixels."""
        if self.shift > size // 2:
            raise UserError(f"--shift {self.shift} must be from 0 to {size // 2}, half of {size} pixels")

    def __call__(self, values: Tensor, seed: int, epoch: int, index: int) -> Tensor:
        """Changes image number `index`: values (3, H, H) -> the same shape and dtype."""
        if not (self.flip or self.shift):
            return values
        rng = np.random.default_rng((seed, epoch, index))
        if self.flip and rng.random() < 0.5:
            values = values.flip(2)
        if self.shift:
            moved = rng.integers(-self.shift, self.shift, size=2, endpoint=True)
            last = values.shape[1] - 1
            rows, columns = (torch.arange(last + 1).sub(int(by)).clamp(0, last) for by in moved)
            values = values[:, rows[:, None], columns]
        return values
