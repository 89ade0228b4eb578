"""Constraints on the sampled pixels, an addition to the editing of the paper (5.3).

A softmax over values can guarantee them, because its logits can be masked. Letters: N pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from util.pixels import NUM_VALUES


class Constraint:
    """Says which values of a channel are allowed when an image is edited (paper, 5.3).

    A subclass gives `__call__`. `holds_for_means` says whether the mean of pixels that fulfil the constraint
    fulfils it too; it then bounds guiding pixels as well.
    """

    holds_for_means = False

    def __call__(self, channel: int, before: Tensor, reference: Tensor) -> Tensor:
        """Says which values are allowed, (N, 256) bool: at least one for each pixel.

        channel    0, 1, 2 for R, G, B
        before     (N, channel) int64: the sampled values of the channels before it
        reference  (N, 3) int64: the values of the image that is edited, also where its pixels are hidden
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        return type(self).__name__


class Grey(Constraint):
    """Allows grey pixels only: R = G = B. For editing (paper, 5.3)."""

    holds_for_means = True

    def __call__(self, channel: int, before: Tensor, reference: Tensor) -> Tensor:
        if channel == 0:
            return torch.ones(len(reference), NUM_VALUES, dtype=torch.bool, device=reference.device)
        return torch.arange(NUM_VALUES, device=reference.device) == before[:, :1]


class Within(Constraint):
    """Allows values at most `distance` (0..255) away from those of the edited image (paper, 5.3).

    It is for restoration and de-quantisation. Raises ValueError for a distance out of range.
    """

    holds_for_means = True

    def __init__(self, distance: int):
        if not 0 <= distance < NUM_VALUES:
            raise ValueError(f"distance {distance} is out of range; it must be from 0 to {NUM_VALUES - 1}")
        self.distance = distance

    def __call__(self, channel: int, before: Tensor, reference: Tensor) -> Tensor:
        values = torch.arange(NUM_VALUES, device=reference.device)
        return (values - reference[:, channel, None]).abs() <= self.distance


class Palette(Constraint):
    """Allows only these colours, (n, 3) values 0..255, when an image is edited (paper, 5.3).

    Raises ValueError for another shape or values out of range.
    """

    def __init__(self, colours: Sequence[Sequence[int]] | Tensor):
        colours = torch.as_tensor(colours)
        shape = tuple(colours.shape)
        if (
            len(shape) != 2
            or shape[1] != 3
            or not shape[0]
            or colours.min() < 0
            or colours.max() >= NUM_VALUES
        ):
            raise ValueError(f"palette of shape {shape} must be one or more colours of R, G, B from 0 to 255")
        self.colours = colours.long()

    def __call__(self, channel: int, before: Tensor, reference: Tensor) -> Tensor:
        colours = self.colours.to(reference.device, non_blocking=True)
        fitting = (before[:, None] == colours[None, :, :channel]).all(-1)  # (N, n)
        allowed = torch.zeros(len(reference), NUM_VALUES, device=reference.device)
        return allowed.index_add_(1, colours[:, channel], fitting.float()) > 0
