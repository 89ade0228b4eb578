"""Where a place of an image comes to in ADM's centre crop."""

import numpy as np
import pytest
from PIL import Image

from util.crop import center_crop_arr, crop_map


@pytest.mark.parametrize("size", [(40, 20), (20, 41), (400, 300), (37, 90), (8, 8), (5, 7), (263, 129)])
def test_the_map_of_the_crop_follows_the_pixels(size):
    """The centre of mass of a white box, black elsewhere, moves as the box's centre does."""
    (width, height), side = size, 8
    x, y = width // 2 - width // 8, height // 2 - height // 10
    box = (x, y, x + width // 6 + 1, y + height // 5 + 1)
    image = Image.new("L", size)
    image.paste(255, box)
    pixels = np.asarray(center_crop_arr(image, side), dtype=float)
    (sx, ox), (sy, oy) = crop_map(size, side)
    found = [(pixels.sum(axis) * (np.arange(side) + 0.5)).sum() / pixels.sum() for axis in (0, 1)]
    expected = [(box[0] + box[2]) / 2 * sx - ox, (box[1] + box[3]) / 2 * sy - oy]
    assert found == pytest.approx(expected, abs=0.25)
