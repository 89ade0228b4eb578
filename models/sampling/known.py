"""What is known of images before they are drawn: known pixels, and a constraint on the others.

Known patches go to a level's transformer as if it had decided them, partly known ones are entered with what is known of
them, down to single pixels. Nothing is trained for it.
Letters: N images at a level, H image side, p patch side, L patches an image, k patches decided in one step.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.patches import patchify, take
from models.sampling.constraints import Constraint
from util.pixels import NUM_VALUES, to_values

SPREAD = 12.0  # levels; see KnownPixels.guide_weights


@dataclass(frozen=True)
class KnownPixels:
    """images (N, 3, H, H): normalised, hidden pixels too, which only a constraint reads. hidden (N, H, H): bool, on the
    host, so that plans are known there; True where pixels are to be drawn. constraint: what all drawn pixels must fulfil."""

    images: Tensor
    hidden: Tensor
    constraint: Constraint | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def part(self, rows: slice | Tensor) -> "KnownPixels":
        """Those images; `rows` are a slice, or numbers (n,) on the host."""
        there = rows if isinstance(rows, slice) else rows.to(self.images.device)
        return replace(self, images=self.images[there], hidden=self.hidden[rows])

    def shown(self) -> Tensor:
        """The images (N, 3, H, H), hidden pixels grey."""
        return self.images.masked_fill(self.hidden[:, None].to(self.images.device), 0)

    def incomplete(self) -> Tensor:
        """Numbers (n,) of the images that have a hidden pixel, on the host."""
        return self.hidden.flatten(1).any(1).nonzero().squeeze(1)

    def hidden_pixels(self, patch_size: int) -> Tensor:
        """(N, L) int64, on the host: how many pixels of each patch are hidden."""
        return patchify(self.hidden[:, None].float(), patch_size).sum(-1).long()

    def groups(
        self, patch_size: int, plan: Callable[[int], Hashable]
    ) -> Iterator[tuple[Hashable, Tensor, "KnownPixels | None"]]:
        """Images for whose numbers of patches to draw `plan` is the same: that plan, their numbers on the host, and what is
        given of them; None where that is nothing."""
        pixels = self.hidden_pixels(patch_size)
        numbers = (pixels > 0).sum(1)
        found: dict[Hashable, list[Tensor]] = {}
        for number in numbers.unique().tolist():
            found.setdefault(plan(number), []).append((numbers == number).nonzero().squeeze(1))
        for one, rows in found.items():
            rows = torch.cat(rows).sort().values
            nothing = self.constraint is None and bool(self.hidden[rows].all())
            yield one, rows, None if nothing else self if len(rows) == len(self) else self.part(rows)

    def precedence(self, patch_size: int) -> Tensor:
        """(N, L) float32, on the host: added to a random order's numbers in [0, 1), it puts known patches first, then those
        partly known, rather those of which most is known."""
        share = self.hidden_pixels(patch_size) / patch_size**2
        return torch.where(share == 0, -3.0, torch.where(share < 1, share - 2, 0.0))

    def in_order(self, patch_size: int, order: Tensor) -> "KnownPatches":
        """What is given of the patches, sorted as in `order` (N, L)."""
        patches, hidden = (
            patchify(self.images, patch_size),
            patchify(self.hidden[:, None].float(), patch_size),
        )
        return KnownPatches(self, patch_size, take(patches, order), take(hidden, order.cpu()).bool())  # sync

    def pixel_weights(self, channel: int, drawn: Tensor) -> Tensor:
        """Of images of one pixel: log-weights (N, 256), 0 or -inf, of a channel, those before it (N, channel) drawn."""
        return log_weights(self.allowed(channel, drawn, to_values(self.images).flatten(1)))

    def allowed(self, channel: int, drawn: Tensor, reference: Tensor) -> Tensor:
        """The constraint's answer (N, 256); ValueError where it allows nothing."""
        allowed = self.constraint(channel, drawn, reference)
        if not allowed.any(-1).all():  # sync
            raise ValueError(f"constraint {self.constraint} allows no value of channel {'RGB'[channel]}")
        return allowed

    def guide_weights(self, channel: int, drawn: Tensor) -> Tensor:
        """Log-weights (N, 256) of the images' guiding pixels, given the known parts of the images.

        The guiding pixel g is the mean of all. Where a share f is hidden, the known mean lies f d away from it, d being the
        distance of hidden and known mean, which is mostly small and sometimes large: Cauchy, with the median SPREAD that
        |d| has in 16-pixel patches of photographs, and 4-pixel ones of emoji. What no hidden values can make up, to within a
        level, is out; with a constraint that holds for means, what no mean of hidden pixels that fulfils it can.
        """
        pixels, hidden = self.hidden.shape[-1] ** 2, self.hidden[:, None].to(self.images.device)
        share = (self.hidden.flatten(1).sum(1) / pixels).to(self.images.device)[:, None]  # (N, 1)
        levels = to_values(self.images)
        known = (levels * ~hidden).flatten(2).sum(
            -1
        ) / pixels  # (N, 3), what known pixels add to the mean of all
        low = known[:, channel, None]
        values = torch.arange(NUM_VALUES, device=low.device)
        away = (values * (1 - share) - low) / (1 - share).clamp(min=1 / pixels) / (share * SPREAD)
        weights = torch.where(share < 1, -torch.log1p(away**2), 0)
        guides = low + share * values  # (N, 256), by the mean of the hidden pixels
        ends = torch.stack([guides.floor(), guides.ceil()]).long().clamp(max=NUM_VALUES - 1)
        if getattr(self.constraint, "holds_for_means", False):  # a plain function does not say
            drawn = (
                ((drawn - known[:, :channel]) / share).round().long().clamp(0, NUM_VALUES - 1)
            )  # of the hidden pixels
            reference = ((levels * hidden).flatten(2).sum(-1) / (share * pixels)).round().long()
            ends = ends.masked_fill(~self.allowed(channel, drawn, reference), NUM_VALUES)
        possible = torch.zeros(len(low), NUM_VALUES + 1, dtype=torch.bool, device=low.device)
        possible = possible.scatter(1, torch.cat([*ends], dim=1), True)[:, :NUM_VALUES]
        return weights + log_weights(possible)


def log_weights(allowed: Tensor) -> Tensor:
    """(N, 256) bool -> 0 or -inf."""
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, -torch.inf)


class KnownPatches:
    """What is given of N images' patches, in the order in which they are decided: patches (N, L, C), hidden (N, L, p * p)."""

    def __init__(self, given: KnownPixels, patch_size: int, patches: Tensor, hidden: Tensor):
        self.given, self.size, self.patches, self.hidden = given, patch_size, patches, hidden

    def step(self, begin: int, end: int) -> KnownPixels:
        """The patches at places [begin, end): N * (end - begin) images of the next level."""
        images = self.patches[:, begin:end].reshape(-1, 3, self.size, self.size)
        return replace(
            self.given, images=images, hidden=self.hidden[:, begin:end].reshape(-1, self.size, self.size)
        )
