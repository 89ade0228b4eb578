"""The crop of guided diffusion (ADM), which this field's numbers are measured with (SPEC section 6)."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def center_crop_arr(pil_image: Image.Image, image_size: int) -> Image.Image:
    """Image of any size -> its centre, `image_size` pixels square.

    Halves with a box filter while the short side is at least twice the target, then bicubic to the target, then crops.
    """
    image = pil_image
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def fast_center_crop(image: Image.Image, image_size: int) -> torch.Tensor:
    """The same in about half of the time -> uint8 (3, image_size, image_size), with other pixels.

    For RGB images that `open_rgb` has read with `at_least` twice the target. torch's kernel resizes last.
    Where nothing is halved, pixels differ by 2 levels at most, and hardly any; else the cut may lie a pixel elsewhere.
    """
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    height, width = round(image.height * scale), round(image.width * scale)
    levels = F.interpolate(levels, size=(height, width), mode="bicubic", antialias=True)[0]
    top, left = (height - image_size) // 2, (width - image_size) // 2
    return levels[:, top : top + image_size, left : left + image_size].contiguous()
