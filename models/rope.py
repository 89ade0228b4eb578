"""2-D rotary position embedding (Su et al. 2021, arXiv 2104.09864), as SPEC section 3 fixes it.

Letters: g grid side, L = g * g patches, d head width, T tokens.
"""

import torch
from torch import Tensor


def rotation_table(grid: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each (1 + L, d / 2) float32: the condition token's row is zero, which makes its q and k zero vectors.

    The first half of the head turns with the row, the second with the column; pair i of a half by 10000 ** (-2 i / h),
    h = d / 2.
    """
    half = head_dim // 2
    frequencies = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)  # (d / 4,)
    angles = torch.arange(grid, dtype=torch.float32)[:, None] * frequencies  # (g, d / 4)
    rows = angles[:, None].expand(grid, grid, -1)
    columns = angles[None, :].expand(grid, grid, -1)
    patches = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (L, d / 2)
    condition = torch.zeros(1, half)
    return torch.cat([condition, patches.cos()]), torch.cat([condition, patches.sin()])


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns neighbouring pairs (0, 1), (2, 3), … of x (N, h, T, d) by cos and sin (T, d / 2), in float32."""
    cos, sin = rotation
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # it writes no kernels for complex numbers
        even, odd = pairs.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos.float(), sin.float()))
    return turned.flatten(-2).type_as(x)


def rotate_(qkv: Tensor, rotation: Tensor) -> Tensor:
    """Turns, in place, q and k of T tokens: (M, T, 3, h, d) float32, by (T, 1, 1, d / 2) = cos + i sin."""
    torch.view_as_complex(qkv[:, :, :2].unflatten(-1, (-1, 2))).mul_(rotation)
    return qkv
