"""What all generator types share: the description of a level, and the interface (paper, 3.1 and 4.1).

A generator (F1) turns the images of its level into patches, and the conditions of an image into conditions of
its patches. A new type gives `forward`, and `plan` and `order` where it does not decide one patch a step in
raster order. Its sampler is registered in models/sampling/canvas.py. See `demo/custom_generator.py`.

Letters: N images of this level, C channels, S an image's sides, p a patch's sides (models/patches.py), L
patches of an image, D width, R patches of the next level.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from models.noise import Noise
from models.patches import Shape, grid_of
from util.pixels import Alphabet


@dataclass(frozen=True)
class LevelSpec:
    """One level (docs/format.md, "Presets"). Sizes are in cells, one number for each axis.

    alphabet  what a cell holds; cond_dim: the width of the level's conditions
    """

    index: int
    alphabet: Alphabet
    img_size: Shape
    patch_size: Shape
    embed_dim: int
    num_blocks: int
    num_heads: int
    cond_dim: int
    num_conds: int
    guiding_pixel: bool
    attn_dropout: float
    proj_dropout: float
    grad_checkpointing: bool

    @property
    def grid(self) -> Shape:
        return grid_of(self.img_size, self.patch_size)

    @property
    def num_patches(self) -> int:
        return prod(self.grid)

    @property
    def patch_shape(self) -> Shape:
        """(C, *p): what a patch is as an image of the next level."""
        return self.alphabet.channels, *self.patch_size

    @property
    def patch_dim(self) -> int:
        return prod(self.patch_shape)


@dataclass(frozen=True)
class Mask:
    """Which patches of a MAR level are masked, and therefore predicted (docs/format.md, "MAR levels").

    masked  (N, L) bool
    rows    (R,) int64, ascending: the masked patches; patch j of image n has number n * L + j
    """

    masked: Tensor
    rows: Tensor

    @classmethod
    def of(cls, masked: Tensor) -> "Mask":
        """Makes a Mask of (N, L), nonzero where masked. The host waits for the device, for the number R."""
        masked = masked.bool()
        return cls(masked, masked.flatten().nonzero().squeeze(1))  # sync

    @classmethod
    def of_counts(cls, counts: np.ndarray, order: Tensor) -> "Mask":
        """Masks the `counts[n]` patches of image n with the lowest `order` (N, L). Counts are on the host."""
        rank = order.argsort(dim=-1, stable=True).argsort(-1)
        on_host = torch.from_numpy(counts.astype(np.int16 if order.shape[1] < 2**15 else np.int64))
        if torch.accelerator.is_available():
            on_host = on_host.pin_memory()  # otherwise copying more than 64 KiB waits for the device
        masked = rank < on_host.to(order.device, non_blocking=True)[:, None]
        rows = (
            masked.flatten().to(torch.uint8).argsort(dim=0, descending=True, stable=True)[: int(counts.sum())]
        )
        return cls(masked, rows)

    def to(self, device: torch.device) -> "Mask":
        return Mask(self.masked.to(device, non_blocking=True), self.rows.to(device, non_blocking=True))


@dataclass(frozen=True)
class Steps:
    """In which step the sampler decides each patch of a MAR level (docs/format.md, "Sampling").

    order  (N, L) int64: the numbers of the patches in the order in which they are decided
    plan   for each step, the places [begin, end) of that order
    """

    order: Tensor
    plan: tuple[tuple[int, int], ...]

    def to(self, device: torch.device) -> "Steps":
        return Steps(self.order.to(device, non_blocking=True), self.plan)


@dataclass(frozen=True)
class ForwardOptions:
    """The choices of one forward pass; none of them is read from `module.training`.

    masks   one entry for each level: a Mask; Steps, to predict all patches as the sampler does; or None,
            where the level has no mask or draws one. None instead of the list: all levels draw theirs
    train   masks and channel weights as in training, or as in evaluation (docs/format.md, "MAR levels")
    dither  standard deviation, in values, of noise that is added to a guiding pixel before rounding
    round_guiding_pixel  whether a level sees its guiding pixel rounded, as in sampling, or exact
    """

    masks: Sequence[Mask | Steps | None] | None = None
    train: bool = True
    dither: float = 0.01
    round_guiding_pixel: bool = False


@dataclass(frozen=True)
class LevelOutput:
    """What a level passes down (F1): images (R, C, *p), conditions, each (R, D); and its loss terms."""

    images: Tensor
    conds: list[Tensor]
    terms: list = field(default_factory=list)


class Generator(nn.Module):
    """The generator g_i of one level (paper, 3.1) (F1).

    spec               the description of its level
    num_conds_out      the number of conditions that it gives to each patch; None: 1 + 2 * axes, for the patch
                       itself and its neighbours
    num_conds_in       the number of conditions that it uses; None: the model's `num_conds`
    exact_likelihood   whether one forward pass gives the probabilities that it samples from; else Steps do
    has_feature_cache  whether its sampler supports `feature_cache_interval`
    """

    num_conds_out: int | None
    num_conds_in: int | None
    exact_likelihood = True
    has_feature_cache = False

    def __init__(self, spec: LevelSpec):
        super().__init__()
        self.spec = spec

    @property
    def num_conds(self) -> int:
        """The number of conditions that it uses: the first ones of those that it receives."""
        return self.num_conds_in or self.spec.num_conds

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, images: Tensor, conds: Sequence[Tensor], options: ForwardOptions) -> LevelOutput:
        """Predicts from true patches (F2): normalised images (N, C, *S), conditions, each (N, cond_dim)."""
        raise NotImplementedError

    def run(self, x: Tensor) -> Tensor:
        """Runs the transformer blocks alone on embedded tokens (N, T, D); the cost report measures this."""
        raise NotImplementedError(f"{type(self).__name__}.run, which the cost report measures")

    def draw_mask(self, noise: Noise, train: bool) -> Mask | None:
        """The mask that `noise` decides; None for a type that predicts all patches."""
        return None

    def draw_steps(self, noise: Noise, num_iter: int) -> Steps | None:
        """The sampler's steps that `noise` decides; None for a type with `exact_likelihood`."""
        return None

    def plan(self, num_iter: int, hidden: int | None = None) -> Iterator[tuple[int, int, float]]:
        """Yields the sampler's steps: places [begin, end) of the order, and the progress in [0, 1] for
        guidance.

        If only `hidden` patches are to be sampled, a plan may leave out the others, provided that `order`
        puts those first (docs/format.md, "Sampling").
        """
        length = self.spec.num_patches
        for step in range(length):
            yield step, step + 1, (step + 1) / length

    def order(self, uniforms: Tensor, precedence: Tensor | None = None) -> Tensor:
        """The order in which patches are decided: patch numbers (N, L), from the images' uniforms (N, L).

        Types that sort the uniforms first add `precedence` (N, L) to them: negative numbers come first.
        """
        return torch.arange(self.spec.num_patches, device=uniforms.device).expand(len(uniforms), -1)


GENERATORS: dict[str, type[Generator]] = {}


def register_generator(
    name: str, num_conds_out: int | None, num_conds_in: int | None = None
) -> Callable[[type[Generator]], type[Generator]]:
    """Class decorator that makes a Generator available as `name` (docs/format.md, "Presets").

    `Generator` explains the two numbers. Raises ValueError for a name that is taken.
    """

    def add(cls: type[Generator]) -> type[Generator]:
        if name in GENERATORS:
            raise ValueError(f"generator type {name!r} is registered already")
        cls.num_conds_out, cls.num_conds_in = num_conds_out, num_conds_in
        GENERATORS[name] = cls
        return cls

    return add
