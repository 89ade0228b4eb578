"""Checks images and masks that users hand in, and turns them into tensors.

Letters: B images, C channels, H and W in pixels.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.data.decode import changes, open_rgb, to_rgb
from util.errors import UserError, reading, warn_once

MAX_PIXELS = 64 * 2**20
CLEAR_MASK = "a mask with transparent pixels; make each pixel black (kept) or white (repainted)"
ORIENTATION = 0x0112  # the EXIF tag


def open_image(path: str | Path) -> tuple[Image.Image, str]:
    """Reads an image file of at most 64 Mi pixels as RGB, as the reader of training data does.

    So an opaque image of 8 bits a channel keeps its pixels, and of others an animation gives its first frame,
    transparent pixels lie over white, 16 bits are scaled, and EXIF data turns it upright. Returns the image,
    and a line that says which of these was done; "" if none was. Raises UserError that names the file.
    """
    with reading(path, "cannot be read as an image"), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{image.width} x {image.height} pixels are too many; make it smaller than 64 Mi pixels"
                )
            done = [changes(image), *["it is turned upright"] * (image.getexif().get(ORIENTATION, 1) > 1)]
        line = ", ".join(filter(None, done))
        return open_rgb(path), line and f"{path}: {line}"


def open_mask(path: str | Path) -> tuple[Image.Image, str]:
    """Reads a mask as `open_image` does. Raises UserError for a transparent one, whose white is not known."""
    mask, line = open_image(path)
    if "transparent" in line:
        raise UserError(f"{path}: {CLEAR_MASK}")
    return mask, line


def to_batch(images, channels: int, what: str) -> Tensor:
    """Turns one or several images into a tensor (B, C, H, W) of their own dtype. C is `channels`, 3 or 1.

    Takes PIL images, NumPy arrays (H, W, C) or (B, H, W, C), tensors (C, H, W) or (B, C, H, W), or a list of
    them. If C is 1, arrays and tensors may lack its axis. PIL images become RGB as in training: transparent
    pixels lie over white, 16 bits are scaled, and a line says so. Arrays and tensors hold what they hold.
    Raises UserError that calls the images `what`.
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
        if line := changes(images):
            if channels == 1 and "transparent" in line:
                raise UserError(CLEAR_MASK)
            warn_once(f"{what}: {line}")
        images = np.asarray(to_rgb(images).convert("RGB" if channels == 3 else "L"))
    if isinstance(images, np.ndarray):
        if images.dtype.kind not in "biuf":
            raise UserError(f"{what} has {images.dtype} values; it must be of integers or floats")
        tensor = torch.from_numpy(images.astype(images.dtype.newbyteorder("=")))
        if tensor.dim() > 2 and tensor.shape[-1] == channels:
            tensor = tensor.movedim(-1, -3)
    elif isinstance(images, Tensor):
        tensor = images.detach()
    else:
        raise UserError(
            f"{what} must be a PIL image, an array or a tensor, or a list of them, "
            f"got {type(images).__name__}"
        )
    if channels == 1 and (tensor.dim() < 3 or tensor.shape[-3] != 1):
        tensor = tensor.unsqueeze(-3)
    tensor = tensor if tensor.dim() == 4 else tensor[None]
    if tensor.dim() != 4 or tensor.shape[1] != channels or not tensor.numel():
        raise UserError(
            f"{what} of shape {tuple(images.shape)}; it must have {channels} channels, "
            "NumPy's last and torch's first"
        )
    # torch cannot compare unsigned integers of these types
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32) else tensor


def to_value_batch(images, side: int | None = None) -> Tensor:
    """Turns one or several images into values: uint8 (B, 3, H, W), on the device of the images.

    Takes what `to_batch` takes, with values 0..255 in any integer dtype, or floats 0..1, which are rounded to
    the nearest 255th. Raises UserError for others, and if H and W are not `side`.
    """
    tensor = to_batch(images, 3, "image")
    low, high = tensor.min().item(), tensor.max().item()
    top = 1 if tensor.is_floating_point() else 255
    if not (low >= 0 and high <= top) or tensor.dtype == torch.bool:
        raise UserError(
            f"image has {tensor.dtype} values from {low:g} to {high:g}; "
            "give integers 0 to 255, or floats 0 to 1"
        )
    height, width = tensor.shape[2:]
    if side is not None and (height, width) != (side, side):
        raise UserError(
            f"image of {width} x {height} pixels for a model of {side} x {side}; "
            "crop it first (util.crop.center_crop_arr)"
        )
    return (tensor.float() * 255).round().to(torch.uint8) if top == 1 else tensor.to(torch.uint8)


def to_mask_batch(masks, size: tuple[int, int]) -> Tensor:
    """Turns one or several masks into bool (B, H, W) on the host, True where the mask is white.

    Takes what `to_batch` takes, with C = 1 and two values: 0, and 1 or 255.
    Raises UserError for others, and if (H, W) is not `size`.
    """
    tensor = to_batch(masks, 1, "mask")[:, 0].cpu()
    height, width = tensor.shape[1:]
    if (height, width) != tuple(size):
        raise UserError(
            f"mask of {width} x {height} pixels for an image of {size[1]} x {size[0]}; "
            "they must be of one size"
        )
    white = 255 if tensor.max() > 1 else 1
    if not ((tensor == 0) | (tensor == white)).all():
        odd = tensor[(tensor != 0) & (tensor != white)][0].item()
        raise UserError(f"mask is not binary, it has a value {odd:g}; 0 is kept, 1 (or 255) is repainted")
    return tensor != 0
