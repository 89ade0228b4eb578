"""Cuts images into patches, joins patches to images, and finds the neighbours of patches (paper, 4.1).

Letters: N images, C channels, H image side, p patch side, g = H / p patches a side, L = g * g, D width.
Patches are counted row by row, left to right; inside a patch come channel, then row, then column
(docs/format.md, "Class conditions and levels").
"""

import torch.nn.functional as F
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cuts images (N, C, H, H) into patches (N, L, C * p * p), where p is `patch_size` and must divide H.

    The order is that of docs/format.md, "Class conditions and levels".
    """
    return F.pixel_unshuffle(images, patch_size).flatten(2).transpose(1, 2)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Joins patches (N, L, C * p * p) to images (N, C, H, H); the inverse of `patchify`.

    The order is that of docs/format.md, "Class conditions and levels".
    """
    grid = int(patches.shape[1] ** 0.5)
    return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (grid, grid)), patch_size)


def with_neighbours(middle: Tensor) -> list[Tensor]:
    """Collects the vectors of each patch and of its neighbours (docs/format.md, "MAR levels").

    `middle` (N, L, D) -> five tensors (N, L, D): of the patch itself, and of the patches above, right, below
    and left of it. The vector of a neighbour outside the grid is zero.
    """
    n, length, width = middle.shape
    grid = int(length**0.5)
    padded = F.pad(middle.view(n, grid, grid, width), (0, 0, 1, 1, 1, 1))  # (N, g + 2, g + 2, D)
    offsets = ((1, 1), (0, 1), (1, 2), (2, 1), (1, 0))
    return [padded[:, y : y + grid, x : x + grid].reshape(n, length, width) for y, x in offsets]


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
