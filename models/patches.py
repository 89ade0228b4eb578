"""Images to patches and back, and who a patch's neighbours are.

Letters: N images, C channels, H image side, p patch side, g = H / p patches a side, L = g * g, D width.
Patches go row by row, left to right; inside a patch: channel, then row, then column (SPEC section 3).
"""

import torch.nn.functional as F
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(N, C, H, H) -> (N, L, C * p * p)."""
    return F.pixel_unshuffle(images, patch_size).flatten(2).transpose(1, 2)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """(N, L, C * p * p) -> (N, C, H, H), the inverse of `patchify`."""
    grid = int(patches.shape[1] ** 0.5)
    return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (grid, grid)), patch_size)


def with_neighbours(middle: Tensor) -> list[Tensor]:
    """(N, L, D) -> five of (N, L, D): itself, and the patch above, right, below, left; zeros outside the grid."""
    n, length, width = middle.shape
    grid = int(length**0.5)
    padded = F.pad(middle.view(n, grid, grid, width), (0, 0, 1, 1, 1, 1))  # (N, g + 2, g + 2, D)
    offsets = ((1, 1), (0, 1), (1, 2), (2, 1), (1, 0))
    return [padded[:, y : y + grid, x : x + grid].reshape(n, length, width) for y, x in offsets]


def take(x: Tensor, where: Tensor) -> Tensor:
    """(N, L, ...) and patch numbers (N, k) -> (N, k, ...)."""
    index = where.view(*where.shape, *(1,) * (x.dim() - 2)).expand(*where.shape, *x.shape[2:])
    return x.gather(1, index)


def put(x: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """`x` (N, L, D) with `values` (N, k, D) at the patch numbers (N, k)."""
    return x.scatter(1, where[..., None].expand_as(values), values)
