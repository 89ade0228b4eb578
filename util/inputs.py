"""Images and masks of users -> tensors, or one line that says what is wrong with them.

Letters: B images, H and W in pixels.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.errors import UserError, one_line

MAX_PIXELS = 64 * 2**20
EXACT_MODES = (
    "1",
    "L",
    "P",
    "RGB",
    "LA",
    "PA",
    "RGBA",
    "RGBX",
)  # whose colours have an exact RGB, where they are opaque


def open_exact(path: str | Path) -> Image.Image:
    """An image file of any size up to 64 Mi pixels -> RGB, its pixels as they are in the file.

    Unlike the reader of training data it changes nothing, so that a known pixel means something: animated, transparent and
    16-bit images, and CMYK, are errors. Raises UserError that names the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(path)
        with opened as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{image.width} x {image.height} pixels are too many; make it smaller than 64 Mi pixels"
                )
            if any(";16" in str(tile[3]) for tile in image.tile):  # Pillow would halve the bits of colours
                raise UserError("a 16-bit image; make it one of 8 bits a channel first")
            image.load()
            return exact_rgb(image)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # on a damaged file Pillow's readers raise whatever they stumble over
        raise UserError(f"{path}: cannot be read as an image ({one_line(error)})") from error


def exact_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image -> RGB with the same colours. UserError for one that has other than 8-bit opaque still pixels."""
    if getattr(image, "n_frames", 1) > 1:
        raise UserError(
            f"an animated image of {image.n_frames} frames; take out one, for instance with image.seek and copy"
        )
    if image.mode not in EXACT_MODES:
        raise UserError(f"an image of mode {image.mode}; convert it to RGB first")
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        raise UserError("a transparent image; lay it over a background first")
    return image.convert("RGB")


def to_batch(images, channels: Sequence[int], what: str) -> Tensor:
    """An image or several, as PIL, NumPy (H, W, C) or torch (C, H, W) -> a tensor (B, C, H, W) of their own dtype.

    `channels` are the numbers of channels that may be meant; an array or tensor without such an axis gets one of length 1.
    """
    if isinstance(images, (list, tuple)):
        if not images:
            raise UserError(f"{what}: an empty list")
        batch = [to_batch(one, channels, what) for one in images]
        if len({one.shape[1:] for one in batch}) > 1:
            sizes = ", ".join(sorted({f"{one.shape[3]} x {one.shape[2]}" for one in batch}))
            raise UserError(f"{what}: images of different sizes, {sizes}; all in a batch must be alike")
        return torch.cat(batch)
    if isinstance(images, Image.Image):
        images = np.asarray(images)
        images = images if images.ndim == 3 else images[..., None]
        return torch.from_numpy(images.copy()).permute(2, 0, 1)[None]
    if isinstance(images, np.ndarray):
        if images.dtype.kind not in "biuf":
            raise UserError(f"{what} has {images.dtype} values; it must be of integers or floats")
        tensor = torch.from_numpy(images.astype(images.dtype.newbyteorder("=")))
        if tensor.dim() > 2 and tensor.shape[-1] in channels:
            tensor = tensor.movedim(-1, -3)
        elif 1 in channels:
            tensor = tensor.unsqueeze(-3)
    elif isinstance(images, Tensor):
        tensor = images.detach()
        if 1 in channels and (tensor.dim() < 3 or tensor.shape[-3] != 1):
            tensor = tensor.unsqueeze(-3)
    else:
        raise UserError(
            f"{what} must be a PIL image, an array or a tensor, or a list of them, got {type(images).__name__}"
        )
    tensor = tensor if tensor.dim() == 4 else tensor[None]
    if tensor.dim() != 4 or tensor.shape[1] not in channels or not tensor.numel():
        wanted = " or ".join(map(str, channels))
        raise UserError(
            f"{what} of shape {tuple(images.shape)}; it must have {wanted} channels, NumPy's last and torch's first"
        )
    return (
        tensor.long() if tensor.dtype in (torch.uint16, torch.uint32) else tensor
    )  # torch cannot compare these


def to_value_batch(images, side: int | None = None) -> Tensor:
    """Images: PIL, NumPy (B, H, W, 3) or torch (B, 3, H, W), with or without B; levels 0..255 in any integer dtype, or floats
    0..1, which are rounded to the nearest 255th -> uint8 (B, 3, H, W) on their device. `side`: what H and W must be.
    Raises UserError."""
    if isinstance(images, Image.Image):
        images = exact_rgb(images)
    elif isinstance(images, (list, tuple)) and all(isinstance(one, Image.Image) for one in images):
        images = [exact_rgb(one) for one in images]
    tensor = to_batch(images, (3,), "image")
    low, high = tensor.min().item(), tensor.max().item()
    top = 1 if tensor.is_floating_point() else 255
    if not (low >= 0 and high <= top) or tensor.dtype == torch.bool:
        raise UserError(
            f"image has {tensor.dtype} values from {low:g} to {high:g}; give integers 0 to 255, or floats 0 to 1"
        )
    height, width = tensor.shape[2:]
    if side is not None and (height, width) != (side, side):
        raise UserError(
            f"image of {width} x {height} pixels for a model of {side} x {side}; crop it first (util.crop.center_crop_arr)"
        )
    return (tensor.float() * 255).round().to(torch.uint8) if top == 1 else tensor.to(torch.uint8)


def to_mask_batch(masks, size: tuple[int, int]) -> Tensor:
    """Masks: PIL, NumPy (B, H, W) or (B, H, W, 1), torch (B, H, W) or (B, 1, H, W), with or without B, of two values: 0, and
    1 or 255 -> bool (B, H, W) on the host, True where it is white. `size` is (H, W). Raises UserError."""
    if isinstance(masks, Image.Image):
        masks = exact_rgb(masks).convert("L")
    elif isinstance(masks, (list, tuple)) and all(isinstance(one, Image.Image) for one in masks):
        masks = [exact_rgb(one).convert("L") for one in masks]
    tensor = to_batch(masks, (1,), "mask")[:, 0].cpu()
    if tuple(tensor.shape[1:]) != tuple(size):
        height, width = tensor.shape[1:]
        raise UserError(
            f"mask of {width} x {height} pixels for an image of {size[1]} x {size[0]}; they must be of one size"
        )
    white = 255 if tensor.max() > 1 else 1
    if not ((tensor == 0) | (tensor == white)).all():
        odd = tensor[(tensor != 0) & (tensor != white)][0].item()
        raise UserError(f"mask is not binary, it has a value {odd:g}; 0 is kept, 1 (or 255) is repainted")
    return tensor != 0
