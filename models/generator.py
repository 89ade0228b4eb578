"""What every generator type shares: its place in the fractal and its contract.

A generator turns the images of its level into patches, and its incoming conditions into the patches' conditions.
A new type needs `forward` and a `sampler`; `plan` and `order` where they are not raster, one patch a step; and `run`, if
its cost is to be reported:

    @register_generator("mine", num_conds_out=1)
    class Mine(Generator): ...

Letters: N images at this level, p patch side, C = 3 * p * p, L patches an image, K conditions, D width,
R rows (patches) that reach the next level.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.noise import Noise
from models.sampling.canvas import LevelSampler
from models.sampling.known import KnownPixels
from models.sampling.prepare import Setup


@dataclass(frozen=True)
class LevelSpec:
    """One level of the fractal. Sizes in pixels; `cond_dim` is the width of the conditions that come in."""

    index: int
    img_size: int
    patch_size: int
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
    def grid(self) -> int:
        return self.img_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size**2


@dataclass(frozen=True)
class Mask:
    """Which patches of a MAR level are predicted. masked: (N, L) bool. rows: (R,) int64, their numbers, ascending,
    counted through all images; its length is known on the host."""

    masked: Tensor
    rows: Tensor

    @classmethod
    def of(cls, masked: Tensor) -> "Mask":
        """From (N, L), 1 = masked. Reads the number of masked patches back to the host."""
        masked = masked.bool()
        return cls(masked, masked.flatten().nonzero().squeeze(1))  # sync

    @classmethod
    def of_counts(cls, counts: np.ndarray, order: Tensor) -> "Mask":
        """Masks the `counts[n]` (host) first patches in the order of the numbers `order` (N, L)."""
        rank = order.argsort(dim=-1, stable=True).argsort(-1)
        on_host = torch.from_numpy(counts.astype(np.int16 if order.shape[1] < 2**15 else np.int64))
        if torch.accelerator.is_available():
            on_host = on_host.pin_memory()  # else a copy of more than 64 KiB waits for the device
        masked = rank < on_host.to(order.device, non_blocking=True)[:, None]
        rows = (
            masked.flatten().to(torch.uint8).argsort(dim=0, descending=True, stable=True)[: int(counts.sum())]
        )
        return cls(masked, rows)

    def to(self, device: torch.device) -> "Mask":
        return Mask(self.masked.to(device, non_blocking=True), self.rows.to(device, non_blocking=True))


@dataclass(frozen=True)
class Steps:
    """When the sampler decides each patch of a MAR level. order (N, L): patch numbers as they are decided; plan: places
    [begin, end) of the order for each step."""

    order: Tensor
    plan: tuple[tuple[int, int], ...]

    def to(self, device: torch.device) -> "Steps":
        return Steps(self.order.to(device, non_blocking=True), self.plan)


@dataclass(frozen=True)
class ForwardOptions:
    """What one forward pass decides, said instead of read off `module.training`.

    masks     a Mask for each level, None where the level has none or is to draw it; None: all levels draw. Steps instead of
              a Mask: all patches are predicted, each from those of the sampler's earlier steps, in one pass a step
    train     draw masks and weigh channels as in training, else as in evaluation (SPEC sections 3, 4)
    dither    standard deviation, in levels, of the noise added to a guiding pixel before rounding
    as_drawn  levels see their guiding pixel rounded, as the sampler draws it; else its exact mean (as published)
    """

    masks: Sequence[Mask | Steps | None] | None = None
    train: bool = True
    dither: float = 0.01
    as_drawn: bool = False


@dataclass(frozen=True)
class LevelOutput:
    """What goes down: images (R, 3, p, p), conditions, each (R, D), and the guiding head's nll (N, 3) or None."""

    images: Tensor
    conds: list[Tensor]
    guiding_nll: Tensor | None = None


class Generator(nn.Module):
    """One level's generator. `spec` is its place; `num_conds_out` the number of conditions that it gives each patch, and
    `reads` the number that it needs itself (None: the model's num_conds)."""

    num_conds_out: int
    reads: int | None

    def __init__(self, spec: LevelSpec):
        super().__init__()
        self.spec = spec

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, images: Tensor, conds: Sequence[Tensor], choices: ForwardOptions) -> LevelOutput:
        """Teacher-forced: normalised images (N, 3, H, H) and conditions, each (N, cond_dim) -> what goes down."""
        raise NotImplementedError

    def run(self, x: Tensor) -> Tensor:
        """The transformer blocks alone, on embedded tokens (N, T, D): what the cost report counts."""
        raise NotImplementedError(f"{type(self).__name__}.run, which the cost report measures")

    def draw_mask(self, noise: Noise, train: bool) -> Mask | None:
        """The mask that `noise` decides, None for a type whose patches all go down."""
        return None

    def draw_steps(self, noise: Noise, num_iter: int) -> Steps | None:
        """The sampler's steps as `noise` decides them, None for a type whose `forward` hands down all patches as sampled."""
        return None

    def sampler(self, child, setup: Setup) -> LevelSampler:
        """What draws this level's images in one sampling call; `child` draws their patches."""
        raise NotImplementedError

    def plan(self, num_iter: int, hidden: int | None = None) -> Iterator[tuple[int, int, float]]:
        """The steps: places [begin, end) of the order, and the progress in [0, 1] that guidance follows.

        With only `hidden` patches to draw, a plan may leave out as many as are known, if `order` puts these first.
        """
        length = self.spec.num_patches
        for step in range(length):
            yield step, step + 1, (step + 1) / length

    def order(self, noise: Noise, given: KnownPixels | None = None) -> Tensor:
        """(N, L) patch numbers in the order in which they are decided."""
        numbers = torch.arange(self.spec.num_patches, device=noise.order.device)
        return numbers.expand(noise.order.shape[0], -1)


GENERATORS: dict[str, type[Generator]] = {}


def register_generator(
    name: str, num_conds_out: int, reads: int | None = None
) -> Callable[[type[Generator]], type[Generator]]:
    """Class decorator: makes a Generator available as `name` in `generator_type_list`. For the numbers see `Generator`."""

    def add(cls: type[Generator]) -> type[Generator]:
        if name in GENERATORS:
            raise ValueError(f"generator type {name!r} is registered already")
        cls.num_conds_out, cls.reads = num_conds_out, reads
        GENERATORS[name] = cls
        return cls

    return add


def check_architecture(sizes, widths, blocks, heads, generators, num_conds) -> None:
    """Raises ValueError, naming the level, for an architecture that cannot be built."""
    lists = {
        "img_size": sizes,
        "embed_dim": widths,
        "num_blocks": blocks,
        "num_heads": heads,
        "generator_type": generators,
    }
    if len(sizes) < 2 or len({len(entries) for entries in lists.values()}) != 1:
        lengths = ", ".join(f"{name}_list {len(entries)}" for name, entries in lists.items())
        raise ValueError(
            f"the lists need one entry for each level, the RGB head last, and at least two; got {lengths}"
        )
    if sizes[-1] != 1:
        raise ValueError(f"the last of img_size_list must be 1 (a pixel), got {sizes[-1]}")
    if generators[-1] != "ar":
        raise ValueError(
            f"the last of generator_type_list is the RGB head and must be 'ar', got {generators[-1]!r}"
        )
    available = num_conds  # level 0 gets one vector as often as it wants
    for level, kind in enumerate(generators[:-1]):
        if kind not in GENERATORS:
            raise ValueError(
                f"level {level}: unknown generator type {kind!r}; one of {', '.join(GENERATORS)}"
            )
        if sizes[level + 1] < 1 or sizes[level] % sizes[level + 1] or sizes[level] <= sizes[level + 1]:
            raise ValueError(
                f"level {level}: image side {sizes[level]} must be a multiple of patch side {sizes[level + 1]}"
            )
        reads = GENERATORS[kind].reads or num_conds
        if reads > available:
            raise ValueError(
                f"level {level}: num_conds {reads}, but the {generators[level - 1]} level above hands down {available}"
            )
        available = GENERATORS[kind].num_conds_out
    for level, (width, depth, number) in enumerate(zip(widths, blocks, heads, strict=True)):
        if depth < 1:
            raise ValueError(f"level {level}: needs at least one block, got {depth}")
        if number < 1 or width < 1 or width % number:
            raise ValueError(
                f"level {level}: width {width} must be a multiple of the number of heads, {number}"
            )
    if num_conds < 1:
        raise ValueError(f"num_conds must be at least 1, got {num_conds}")
