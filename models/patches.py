"""Cuts images into patches, joins patches to images, and finds the neighbours of patches (paper, 4.1).

An *image* is an array on a grid of one, two or three axes. Letters: N images, C channels, S an image's sides
(one number for each axis), p a patch's sides, P = cells of a patch, g = S / p patches along each axis, L of
them in all, D width. Patches are counted in the order of the axes, the last one fastest: with two axes row
by row, left to right. Inside a patch come channel, then the axes (docs/format.md, "Class conditions and
levels").
"""

from collections.abc import Sequence
from numbers import Integral
from operator import index

import torch.nn.functional as F
from torch import Tensor

from util.errors import ArgumentError

MAX_AXES = 3
Shape = tuple[int, ...]  # one number for each axis


def as_shapes(sizes: Sequence[int | Sequence[int]]) -> tuple[Shape, ...]:
    """The sides of each entry of an `img_size_list` (docs/format.md, "Presets").

    An entry is a sequence with one number for each axis, or an integer, which stands for the same number
    along every axis. Where all entries are integers there are two axes. Raises ValueError where entries have
    different numbers of axes, or more than three.
    """
    try:
        shapes = [index(x) if isinstance(x, Integral) else tuple(map(index, x)) for x in sizes]
    except TypeError:
        shapes = [()]
    axes = {len(shape) for shape in shapes if not isinstance(shape, int)} or {2}
    if len(axes) > 1 or not 1 <= max(axes) <= MAX_AXES:
        wanted = f"whole numbers for one to {MAX_AXES} axes, as many in every entry"
        raise ArgumentError("img_size_list", f"{list(sizes)} must have {wanted}")
    return tuple((shape,) * max(axes) if isinstance(shape, int) else shape for shape in shapes)


def grid_of(shape: Shape, patch_size: Shape) -> Shape:
    """The numbers of patches along each axis, g, of an image with sides `shape`."""
    return tuple(side // patch for side, patch in zip(shape, patch_size, strict=True))


def patchify(images: Tensor, patch_size: Shape) -> Tensor:
    """Cuts images (N, C, *S) into patches (N, L, C * P); the patch's sides must divide the image's.

    The order is that of docs/format.md, "Class conditions and levels".
    """
    n, channels, *shape = images.shape
    pairs = zip(grid_of(shape, patch_size), patch_size, strict=True)
    cells = images.reshape(n, channels, *(number for pair in pairs for number in pair))  # N, C, g1, p1, …
    cells = cells.permute(0, *range(2, cells.dim(), 2), 1, *range(3, cells.dim(), 2))
    return cells.flatten(1 + len(shape)).flatten(1, len(shape))


def unpatchify(patches: Tensor, grid: Shape, patch_size: Shape) -> Tensor:
    """Joins patches (N, L, C * P) to images (N, C, *S), with g = `grid`; the inverse of `patchify`.

    The order is that of docs/format.md, "Class conditions and levels".
    """
    axes, n = len(grid), len(patches)
    pairs = zip(range(1, 1 + axes), range(2 + axes, 2 + 2 * axes), strict=True)
    cells = patches.reshape(n, *grid, -1, *patch_size)  # N, g1, …, C, p1, …
    cells = cells.permute(0, 1 + axes, *(axis for pair in pairs for axis in pair))
    return cells.reshape(n, -1, *(number * side for number, side in zip(grid, patch_size, strict=True)))


def neighbour_offsets(axes: int) -> list[Shape]:
    """The steps to a patch's neighbours, in the order of conditions (docs/format.md, "MAR levels").

    First the one before along the first axis and those after along the others, then their opposites: with two
    axes above, right, below, left.
    """
    steps = [(axis, -turn if axis == 0 else turn) for turn in (1, -1) for axis in range(axes)]
    return [tuple(step * (i == axis) for i in range(axes)) for axis, step in steps]


def with_neighbours(middle: Tensor, grid: Shape) -> list[Tensor]:
    """Collects the vectors of each patch and of its neighbours (docs/format.md, "MAR levels").

    `middle` (N, L, D) -> 1 + 2 * axes tensors (N, L, D): of the patch itself, and of those at
    `neighbour_offsets`. The vector of a neighbour outside the grid is zero.
    """
    axes = len(grid)
    padded = F.pad(middle.unflatten(1, grid), (0, 0, *(1, 1) * axes))  # (N, g1 + 2, …, D)
    parts = [
        [slice(1 + step, 1 + step + side) for step, side in zip(offset, grid, strict=True)]
        for offset in ((0,) * axes, *neighbour_offsets(axes))
    ]
    return [padded[(slice(None), *part)].reshape(middle.shape) for part in parts]


def take(x: Tensor, where: Tensor) -> Tensor:
    """Picks the patches `where` (N, k) int64 of each image: x (N, L, ...) -> (N, k, ...).

    Editing sorts known patches by it (paper, 5.3).
    """
    index = where.view(*where.shape, *(1,) * (x.dim() - 2)).expand(*where.shape, *x.shape[2:])
    return x.gather(1, index)


def put(x: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """Puts sampled patches back (docs/format.md, "Sampling").

    Returns a copy of `x` (N, L, D) with `values` (N, k, D) at the patch numbers `where` (N, k) int64.
    """
    return x.scatter(1, where[..., None].expand_as(values), values)
