"""Constraints on the sampled pixels, an addition to the editing of the paper (5.3).

A softmax over values can guarantee them, because its logits can be masked. Letters: N pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from util.errors import ArgumentError, whole_number
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

    It is for restoration and de-quantisation. Raises UserError for a distance out of range.
    """

    holds_for_means = True

    def __init__(self, distance: int):
        self.distance = whole_number("distance", distance, 0, NUM_VALUES - 1)

    def __call__(self, channel: int, before: Tensor, reference: Tensor) -> Tensor:
        values = torch.arange(NUM_VALUES, device=reference.device)
        return (values - reference[:, channel, None]).abs() <= self.distance


class Palette(Constraint):
    """Allows only these colours, (n, 3) values 0..255, when an image is edited (paper, 5.3).

    Raises UserError for another shape, and for values that are no integers from 0 to 255.
    """

    def __init__(self, colours: Sequence[Sequence[int]] | Tensor):
        try:
            rows = [
                [whole_number("colours", value, 0, NUM_VALUES - 1) for value in (red, green, blue)]
                for red, green, blue in colours
            ]
        except (TypeError, ValueError):
            rows = []
        if not rows:
            raise ArgumentError("colours", "must be one or more of three integers from 0 to 255")
        self.colours = torch.tensor(rows)

    def __call__(self, channel: int, before: Tensor, reference: Tensor) -> Tensor:
        colours = self.colours.to(reference.device, non_blocking=True)
        fitting = (before[:, None] == colours[None, :, :channel]).all(-1)  # (N, n)
        allowed = torch.zeros(len(reference), NUM_VALUES, device=reference.device)
        return allowed.index_add_(1, colours[:, channel], fitting.float()) > 0
