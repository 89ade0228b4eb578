"""What is fixed before images are sampled: known pixels, and a constraint on the others (paper, 5.3).

Known patches go to a level's transformer as if it had decided them. Partly known patches are decided like
others, but their known pixels stay fixed at the levels below. Nothing is trained for this.

Letters: N images of a level, C channels, V values, S an image's sides, p a patch's sides (one number for each
axis), P cells of a patch, L patches of an image.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from models.patches import Shape, patchify, take
from models.sampling.constraints import Constraint
from util.pixels import Alphabet

OnStep = Callable[[int, int, Tensor], None]  # (step, number of steps, canvas (N, C, *S))
MEAN_SPREAD = 12 / 255  # of the largest value; see KnownPixels.guiding_weights


@dataclass(frozen=True)
class KnownPixels:
    """The known pixels of N images (paper, 5.3).

    images      (N, C, *S), normalised, float32; only a constraint uses the hidden pixels
    hidden      (N, *S) bool, True where pixels are to be sampled; on the host, where plans are made
    alphabet    of the images
    constraint  what all sampled pixels must fulfil, or None
    """

    images: Tensor
    hidden: Tensor
    alphabet: Alphabet
    constraint: Constraint | None = None

    def part(self, rows: slice | Tensor) -> "KnownPixels | None":
        """Selects some images, by a slice or by their numbers (int64) on the host.

        Returns None if all their pixels are hidden and there is no constraint.
        """
        hidden = self.hidden[rows]
        if self.constraint is None and bool(hidden.all()):
            return None
        there = rows if isinstance(rows, slice) else rows.to(self.images.device, non_blocking=True)
        return replace(self, images=self.images[there], hidden=hidden)

    def shown(self) -> Tensor:
        """The images (N, C, *S), normalised, where hidden pixels are 0, for RGB a grey."""
        return self.images.masked_fill(self.hidden_there(), 0)

    def hidden_there(self) -> Tensor:
        """`hidden`, (N, 1, *S), on the device of the images."""
        return self.hidden[:, None].to(self.images.device, non_blocking=True)

    def hidden_pixels(self, patch_size: Shape) -> Tensor:
        """(N, L) int64 on the host: the number of hidden pixels in each patch."""
        return patchify(self.hidden[:, None].float(), patch_size).sum(-1).long()

    def groups(self, patch_size: Shape, plan: Callable[[int], Hashable]) -> Iterator[tuple[Hashable, Tensor]]:
        """Groups the images that have a hidden pixel, by the plan for their number of patches to sample.

        `plan` maps that number to a plan. Yields each plan and the numbers of its images, (n,) int64 on the
        host.
        """
        numbers = (self.hidden_pixels(patch_size) > 0).sum(1)
        found: dict[Hashable, list[Tensor]] = {}
        for number in numbers[numbers > 0].unique().tolist():
            found.setdefault(plan(number), []).append((numbers == number).nonzero().squeeze(1))
        for one, rows in found.items():
            yield one, torch.cat(rows).sort().values

    def precedence(self, patch_size: Shape) -> Tensor:
        """(N, L) float32 on the host, to be added to uniforms in [0, 1) that are then sorted.

        Known patches come first. Partly known patches come next, the most complete first.
        """
        share = self.hidden_pixels(patch_size) / prod(patch_size)
        return torch.where(share == 0, -3.0, torch.where(share < 1, share - 2, 0.0))

    def in_order(self, patch_size: Shape, order: Tensor) -> "KnownPatches":
        """Sorts what is known of the patches as in `order` (N, L), which holds patch numbers."""
        patches, hidden = (
            patchify(self.images, patch_size),
            patchify(self.hidden[:, None].float(), patch_size),
        )
        return KnownPatches(self, patch_size, take(patches, order), take(hidden, order.cpu()).bool())  # sync

    def pixel_weights(self, channel: int, before: Tensor) -> Tensor:
        """For images of one pixel: log-weights (N, V), 0 or -inf, of the values of a channel (F5).

        `before` (N, channel) int64 holds the sampled values of the channels before it.
        """
        return log_weights(self.allowed(channel, before, self.alphabet.to_values(self.images).flatten(1)))

    def allowed(self, channel: int, before: Tensor, reference: Tensor) -> Tensor:
        """Which values the constraint allows, (N, V) bool. Raises ValueError where it allows no value."""
        allowed = self.constraint(channel, before, reference)
        if not allowed.any(-1).all():  # sync
            name = self.alphabet.channel_names[channel].upper()
            raise ValueError(f"constraint {self.constraint} allows no value of channel {name}")
        return allowed

    def guiding_weights(self, channel: int, before: Tensor) -> Tensor:
        """Log-weights (N, V) of a channel of guiding pixels, given the known pixels of their images.

        The paper has nothing of this kind. The guiding pixel g is the mean of all pixels
        (docs/format.md, "MAR levels"). Where a share f of them is hidden, g lies f d away from the mean of
        the known pixels, where d is the distance between the hidden and the known mean. This distance is
        mostly small and sometimes large: it gets a Cauchy distribution whose scale MEAN_SPREAD is the median
        of |d|, measured in 16-pixel patches of photographs and in 4-pixel patches of emoji; at least half a
        value, by which g is rounded. Means that no hidden values can produce get probability 0. So do means
        that no allowed hidden mean can produce, if the constraint holds for means too. The arguments are as
        in `pixel_weights`.
        """
        num_values, num_pixels = self.alphabet.num_values, self.hidden[0].numel()
        hidden, spread = self.hidden_there(), max(0.5, MEAN_SPREAD * (num_values - 1))
        share = hidden.flatten(1).sum(1, keepdim=True) / num_pixels  # (N, 1)
        values = self.alphabet.to_values(self.images)
        # (N, C): what the known pixels contribute to the mean of all pixels
        known = (values * ~hidden).flatten(2).sum(-1) / num_pixels
        low = known[:, channel, None]
        every = torch.arange(num_values, device=low.device)
        distance = (every * (1 - share) - low) / (1 - share).clamp(min=1 / num_pixels) / (share * spread)
        weights = torch.where(share < 1, -torch.log1p(distance**2), 0)
        guides = low + share * every  # (N, V), by the mean of the hidden pixels
        ends = torch.stack([guides.floor(), guides.ceil()]).long().clamp(max=num_values - 1)
        if getattr(self.constraint, "holds_for_means", False):  # a plain function has no such attribute
            before = ((before - known[:, :channel]) / share).round().long().clamp(0, num_values - 1)
            reference = ((values * hidden).flatten(2).sum(-1) / (share * num_pixels)).round().long()
            ends = ends.masked_fill(~self.allowed(channel, before, reference), num_values)
        possible = torch.zeros(len(low), num_values + 1, dtype=torch.bool, device=low.device)
        possible = possible.scatter(1, torch.cat([*ends], dim=1), True)[:, :num_values]
        return weights + log_weights(possible)


def log_weights(allowed: Tensor) -> Tensor:
    """(N, V) bool -> 0 where allowed, -inf elsewhere, to be added to logits (F7)."""
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, -torch.inf)


@dataclass(frozen=True)
class KnownPatches:
    """What is known of the patches of N images, in the order of sampling (paper, 5.3).

    patches  (N, L, C * P), normalised
    hidden   (N, L, P) bool, on the host
    """

    known: KnownPixels
    patch_size: Shape
    patches: Tensor
    hidden: Tensor

    def step(self, begin: int, end: int) -> KnownPixels:
        """The patches at places [begin, end) as N * (end - begin) images of the next level."""
        sides = self.patch_size
        images = self.patches[:, begin:end].reshape(-1, self.known.alphabet.channels, *sides)
        return replace(self.known, images=images, hidden=self.hidden[:, begin:end].reshape(-1, *sides))


class GroupCallback:
    """The step callback of a batch that is sampled in groups of images; it shows all images (paper, 5.3)."""

    def __init__(self, on_step: OnStep, known: KnownPixels, num_steps: int):
        self.on_step, self.images, self.num_steps, self.done = on_step, known.shown(), num_steps, 0

    def group(self, rows: Tensor, num_steps: int) -> OnStep:
        """The callback of the next group, the images `rows`, which take `num_steps` steps."""
        before, self.done = self.done, self.done + num_steps

        def on_step(step: int, _: int, images: Tensor) -> None:
            there = rows.to(images.device, non_blocking=True)
            self.images = self.images.index_copy(0, there, images)
            self.on_step(before + step, self.num_steps, self.images)

        return on_step
