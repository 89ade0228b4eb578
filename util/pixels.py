"""Pixels and the integers behind them: the only home of ImageNet's mean and standard deviation.

*Levels* are the integers 0..255 of an 8-bit image; *normalised* values are (levels / 255 - mean) / std per channel.
Letters: B images, N rows, H and W in pixels.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
NUM_VALUES = 256


def _per_channel(values: tuple[float, ...], like: Tensor, dim: int) -> Tensor:
    shape = [1] * like.dim()
    shape[dim] = 3
    # As three scalars in one allocation on the data's device: copying a host tensor there would wait for it.
    return torch.stack([like.new_full((), v) for v in values]).view(shape)


def normalize(levels: Tensor, dim: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Levels (uint8 or any number in 0..255), RGB along `dim` -> normalised values of the same shape, `dtype`."""
    x = levels.to(torch.float32)
    return ((x / 255 - _per_channel(MEAN, x, dim)) / _per_channel(STD, x, dim)).to(dtype)


def to_values(x: Tensor, dim: int = 1, dither: float = 0.0) -> Tensor:
    """Normalised values, RGB along `dim` -> levels 0..255, int64, same shape.

    `dither` is the standard deviation, in levels, of Gaussian noise added before rounding (SPEC section 4).
    It decides ties of values that are not whole, such as the mean of a patch.
    """
    x = x.to(torch.float32)
    levels = 255 * (x * _per_channel(STD, x, dim) + _per_channel(MEAN, x, dim))
    if dither:
        levels = levels + dither * torch.randn_like(levels)
    return levels.round().clamp(0, NUM_VALUES - 1).long()


def to_uint8(images: Tensor) -> Tensor:
    """Normalised images (B, 3, H, W) -> uint8 (B, 3, H, W)."""
    return to_values(images).to(torch.uint8)


def to_numpy(images: Tensor) -> np.ndarray:
    """Normalised images (B, 3, H, W) -> uint8 array (B, H, W, 3) on the host."""
    return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Normalised images (B, 3, H, W) -> B RGB images."""
    return [Image.fromarray(image) for image in to_numpy(images)]
