"""Constraints on the sampled pixels, an addition to the editing of the paper (5.3).

A softmax over values can guarantee them, because its logits can be masked. Letters: N pixels, C channels, V
values.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from util.errors import ArgumentError, whole_number
from util.pixels import RGB, Alphabet


class Constraint:
    """Says which values of a channel are allowed when an image is edited (paper, 5.3).

    A subclass gives `__call__`.

    alphabet         of the model; `of` sets it
    holds_for_means  whether the mean of pixels that fulfil the constraint fulfils it too; it then bounds
                     guiding pixels as well
    """

    alphabet: Alphabet = RGB
    holds_for_means = False

    def of(self, alphabet: Alphabet) -> "Constraint":
        """This constraint for a model with `alphabet`. Raises UserError where it cannot be one."""
        constraint = copy.copy(self)
        constraint.alphabet = alphabet
        return constraint

    def __call__(self, channel: int, before: Tensor, reference: Tensor) -> Tensor:
        """Says which values are allowed, (N, V) bool: at least one for each pixel.

        channel    its number; 0, 1, 2 for R, G, B
        before     (N, channel) int64: the sampled values of the channels before it
        reference  (N, C) int64: the values of the image that is edited, also where its pixels are hidden
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        return type(self).__name__


class Grey(Constraint):
    """Allows grey pixels only, R = G = B, when an image is edited (paper, 5.3)."""

    holds_for_means = True

    def __call__(self, channel: int, before: Tensor, reference: Tensor) -> Tensor:
        values = torch.arange(self.alphabet.num_values, device=reference.device)
        return (values >= 0 if channel == 0 else values == before[:, :1]).expand(len(reference), -1)


class Within(Constraint):
    """Allows values at most `distance` away from those of the edited image (paper, 5.3).

    It is for restoration and de-quantisation of ordinal values. Raises UserError for a distance below 0.
    """

    holds_for_means = True

    def __init__(self, distance: int):
        self.distance = whole_number("distance", distance, 0)

    def of(self, alphabet: Alphabet) -> Constraint:
        if not alphabet.is_ordinal:
            raise ArgumentError("constraint", "Within needs ordinal values; categories have no distance")
        whole_number("distance", self.distance, 0, alphabet.num_values - 1)
        return super().of(alphabet)

    def __call__(self, channel: int, before: Tensor, reference: Tensor) -> Tensor:
        values = torch.arange(self.alphabet.num_values, device=reference.device)
        return (values - reference[:, channel, None]).abs() <= self.distance


class Palette(Constraint):
    """Allows only these colours, (n, C) values, when an image is edited (paper, 5.3).

    Raises UserError for what are no colours, and `of` for those that the model's cells cannot have.
    """

    def __init__(self, colours: Sequence[Sequence[int]] | Tensor):
        try:
            rows = [[whole_number("colours", value, 0) for value in colour] for colour in colours]
            self.colours = torch.tensor(rows)
        except (TypeError, ValueError):
            self.colours = torch.tensor([])
        if self.colours.dim() != 2:
            raise ArgumentError("colours", "must be one or more, each with an integer for every channel")

    def of(self, alphabet: Alphabet) -> Constraint:
        channels, top = alphabet.channels, alphabet.num_values - 1
        if self.colours.shape[1] != channels or self.colours.max() > top:
            raise ArgumentError("colours", f"must have {channels} numbers each, from 0 to {top}")
        return super().of(alphabet)

    def __call__(self, channel: int, before: Tensor, reference: Tensor) -> Tensor:
        colours = self.colours.to(reference.device, non_blocking=True)
        fitting = (before[:, None] == colours[None, :, :channel]).all(-1)  # (N, n)
        allowed = torch.zeros(len(reference), self.alphabet.num_values, device=reference.device)
        return allowed.index_add_(1, colours[:, channel], fitting.float()) > 0
