"""Checks images and masks that users hand in, and turns them into tensors.

Letters: B images, C channels, V values. `shape` is the number of cells along each axis, (H, W) for images.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.data.decode import changes, open_as, to_mode
from util.errors import UserError, reading, warn_once
from util.pixels import IMAGE_MODES, Alphabet, in_words

MAX_PIXELS = 64 * 2**20
CLEAR_MASK = "a mask with transparent pixels; make each pixel black (kept) or white (repainted)"
ORIENTATION = 0x0112  # the EXIF tag


def open_image(path: str | Path, mode: str = "RGB") -> tuple[Image.Image, str]:
    """Reads an image file of at most 64 Mi pixels in Pillow's `mode`, as the reader of training data does.

    So an opaque image of 8 bits a channel keeps its pixels, and of others an animation gives its first frame,
    transparent pixels lie over white (but in mode "RGBA"), 16 bits are scaled, and EXIF data turns it
    upright. Returns the image, and a line that says which of these was done; "" if none was. Raises UserError
    that names the file.
    """
    with reading(path, "cannot be read as an image"), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{image.width} x {image.height} pixels are too many; make it smaller than 64 Mi pixels"
                )
            done = [
                changes(image, mode),
                *["it is turned upright"] * (image.getexif().get(ORIENTATION, 1) > 1),
            ]
        line = ", ".join(filter(None, done))
        return open_as(path, mode), line and f"{path}: {line}"


def open_mask(path: str | Path) -> tuple[Image.Image, str]:
    """Reads a mask as `open_image` does. Raises UserError for a transparent one, whose white is not known."""
    mask, line = open_image(path)
    if "transparent" in line:
        raise UserError(f"{path}: {CLEAR_MASK}")
    return mask, line


def to_batch(images, axes: int, alphabet: Alphabet, what: str) -> Tensor:
    """Turns one or several images into a tensor (B, C, *shape) of their own dtype, with `axes` axes of cells.

    Takes PIL images, NumPy arrays (*shape, C) or (B, *shape, C), tensors (C, *shape) or (B, C, *shape), or a
    list of them. If C is 1, arrays and tensors may lack its axis. PIL images hold 8-bit samples, and become
    values as in training: transparent pixels lie over white, 16 bits are scaled, and a line says so. Arrays
    and tensors hold what they hold. Raises UserError that calls the images `what`.
    """
    channels = alphabet.channels
    if isinstance(images, (list, tuple)):
        if not images:
            raise UserError(f"{what}: an empty list")
        batch = [to_batch(one, axes, alphabet, what) for one in images]
        if len({one.shape[1:] for one in batch}) > 1:
            sizes = ", ".join(sorted({in_words(one.shape[2:]) for one in batch}))
            raise UserError(f"{what}: images of different sizes, {sizes}; all in a batch must be alike")
        return torch.cat(batch)
    if isinstance(images, Image.Image):
        if not alphabet.is_image((0,) * axes):
            raise UserError(
                f"{what}: a PIL image has two axes, 1, 3 or 4 channels and up to 256 values; give an array"
            )
        mode = IMAGE_MODES[channels]
        if line := changes(images, mode):
            if what == "mask" and "transparent" in line:
                raise UserError(CLEAR_MASK)
            warn_once(f"{what}: {line}")
        images = alphabet.from_bytes(np.asarray(to_mode(images, mode)))
    if isinstance(images, np.ndarray):
        if images.dtype.kind not in "biuf":
            raise UserError(f"{what} has {images.dtype} values; it must be of integers or floats")
        tensor = torch.from_numpy(images.astype(images.dtype.newbyteorder("=")))
        if tensor.dim() > axes and tensor.shape[-1] == channels:
            tensor = tensor.movedim(-1, -axes - 1)
    elif isinstance(images, Tensor):
        tensor = images.detach()
    else:
        raise UserError(
            f"{what} must be a PIL image, an array or a tensor, or a list of them, "
            f"got {type(images).__name__}"
        )
    if channels == 1 and tensor.dim() >= axes and (tensor.dim() == axes or tensor.shape[-axes - 1] != 1):
        tensor = tensor.unsqueeze(-axes - 1)
    tensor = tensor if tensor.dim() == axes + 2 else tensor[None]
    grid = f" on a {axes}-axis grid" * (axes != 2)
    if tensor.dim() != axes + 2 or tensor.shape[1] != channels or not tensor.numel():
        raise UserError(
            f"{what} of shape {tuple(images.shape)}; it must have {channels} channels{grid}, "
            "NumPy's last and torch's first"
        )
    # torch cannot compare unsigned integers of these types
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else tensor


def to_value_batch(images, shape: Sequence[int | None], alphabet: Alphabet) -> Tensor:
    """Turns one or several images into values: (B, C, *shape) of the alphabet's dtype, on the images' device.

    Takes what `to_batch` takes, with values 0..V-1 in any integer dtype, or for ordinal values floats 0..1,
    which are rounded to the nearest of V - 1 steps. None in `shape` stands for any number of cells along an
    axis. Raises UserError for others.
    """
    tensor = to_batch(images, len(shape), alphabet, "image")
    floats, last = tensor.is_floating_point(), alphabet.num_values - 1
    low, high = tensor.min().item(), tensor.max().item()
    allowed = alphabet.is_ordinal if floats else tensor.dtype != torch.bool or last == 1
    if not (allowed and low >= 0 and high <= (1 if floats else last)):
        raise UserError(
            f"image has {tensor.dtype} values from {low:g} to {high:g}; give integers 0 to {last}"
            + ", or floats 0 to 1" * alphabet.is_ordinal
        )
    _check_size("image", tensor, shape, "a model", "crop it first (util.crop.center_crop_arr)")
    return (tensor.float() * last).round().to(alphabet.dtype) if floats else tensor.to(alphabet.dtype)


def to_exact_batch(images, axes: int, alphabet: Alphabet) -> Tensor:
    """As `to_value_batch` for any size, but raises UserError where that would change a value.

    These are floats, and PIL images that the alphabet cannot hold as they are.
    """
    batch = to_batch(images, axes, alphabet, "image")
    if batch.is_floating_point():
        raise UserError(f"image has {batch.dtype} values, which may be rounded; give integers")
    for number, one in enumerate(images if isinstance(images, list | tuple) else [images]):
        if isinstance(one, Image.Image):
            (found,) = alphabet.to_pil(alphabet.normalize(to_batch(one, axes, alphabet, "image")))
            if changes(one, found.mode) or to_mode(one, "RGBA").tobytes() != to_mode(found, "RGBA").tobytes():
                what = changes(one, found.mode) or "it has other colours"
                raise UserError(
                    f"image {number} is not of {alphabet.channels} channels with {alphabet.num_values} "
                    f"values each: {what}; convert it first"
                )
    return to_value_batch(batch, (None,) * axes, alphabet)


def to_mask_batch(masks, shape: Sequence[int]) -> Tensor:
    """Turns one or several masks over cells into bool (B, *shape) on the host, True where the mask is white.

    Takes what `to_batch` takes, with C = 1 and two values: 0, and 1 or 255.
    Raises UserError for others, and if they are of another shape.
    """
    tensor = to_batch(masks, len(shape), Alphabet(1), "mask").cpu()
    _check_size("mask", tensor, shape, "an image", "they must be of one size")
    white = 255 if tensor.max() > 1 else 1
    if not ((tensor == 0) | (tensor == white)).all():
        odd = tensor[(tensor != 0) & (tensor != white)][0].item()
        raise UserError(f"mask is not binary, it has a value {odd:g}; 0 is kept, 1 (or 255) is repainted")
    return tensor[:, 0] != 0


def _check_size(what: str, tensor: Tensor, shape: Sequence[int | None], whose: str, advice: str) -> None:
    found = tensor.shape[2:]
    if any(wanted not in (None, side) for wanted, side in zip(shape, found, strict=True)):
        raise UserError(f"{what} of {in_words(found)} for {whose} of {in_words(shape)}; {advice}")
