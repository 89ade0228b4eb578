"""Constraints on the pixels that are drawn: what a categorical head can promise, by masking its logits.

Letters: N pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from util.pixels import NUM_VALUES


class Constraint:
    """Which values of a channel are allowed. A subclass gives `__call__`, and says whether the mean of pixels that fulfil it
    does so too, which then bounds guiding pixels."""

    holds_for_means = False

    def __call__(self, channel: int, drawn: Tensor, reference: Tensor) -> Tensor:
        """channel 0, 1, 2 for R, G, B; drawn (N, channel) int64, the channels before it; reference (N, 3) int64, the levels of
        the image that is edited, hidden ones too -> (N, 256) bool, True where a value is allowed. At least one must be."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return type(self).__name__


class Grey(Constraint):
    """R = G = B."""

    holds_for_means = True

    def __call__(self, channel: int, drawn: Tensor, reference: Tensor) -> Tensor:
        if channel == 0:
            return torch.ones(len(reference), NUM_VALUES, dtype=torch.bool, device=reference.device)
        return torch.arange(NUM_VALUES, device=reference.device) == drawn[:, :1]


class Within(Constraint):
    """At most `distance` levels away from the image that is edited: for restoration and de-quantisation."""

    holds_for_means = True

    def __init__(self, distance: int):
        if not 0 <= distance < NUM_VALUES:
            raise ValueError(
                f"distance {distance} is out of range; it must be from 0 to {NUM_VALUES - 1} levels"
            )
        self.distance = distance

    def __call__(self, channel: int, drawn: Tensor, reference: Tensor) -> Tensor:
        values = torch.arange(NUM_VALUES, device=reference.device)
        return (values - reference[:, channel, None]).abs() <= self.distance


class Palette(Constraint):
    """Only these colours, (n, 3) levels 0..255."""

    def __init__(self, colours: Sequence[Sequence[int]] | Tensor):
        colours = torch.as_tensor(colours)
        if (
            colours.dim() != 2
            or colours.shape[1] != 3
            or not len(colours)
            or colours.min() < 0
            or colours.max() >= NUM_VALUES
        ):
            raise ValueError(
                f"palette of shape {tuple(colours.shape)} must be one or more colours of R, G, B from 0 to 255"
            )
        self.colours = colours.long()

    def __call__(self, channel: int, drawn: Tensor, reference: Tensor) -> Tensor:
        colours = self.colours.to(reference.device)
        fitting = (drawn[:, None] == colours[None, :, :channel]).all(-1)  # (N, n)
        allowed = torch.zeros(len(reference), NUM_VALUES, device=reference.device)
        return allowed.index_add_(1, colours[:, channel], fitting.float()) > 0
