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


@pytest.mark.parametrize("size", [(40, 20), (20, 41), (400, 300), (37, 90), (8, 12), (5, 7), (263, 129)])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (1, 30), (7, 7)])
def test_a_rectangle_is_covered_from_the_centre_without_distortion(size, shape):
    """A picture of its own coordinates: at every place of the crop is what `crop_map` says, by one scale for both axes."""
    (width, height), (rows, columns) = size, shape
    y, x = np.mgrid[:height, :width] + 0.5
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in (x, y)]
    found_x, found_y = (np.asarray(center_crop_arr(plane, shape)) for plane in planes)
    assert found_x.shape == found_y.shape == shape
    (sx, ox), (sy, oy) = crop_map(size, shape)
    assert max(sx * width - columns, sy * height - rows) >= 0
    assert min(sx * width - columns, sy * height - rows) <= 1  # no more is cut off than must be
    inner = (slice(rows // 4, max(1, -(rows // 4) + rows)), slice(columns // 4, columns - columns // 4))
    expected_x = (np.arange(columns) + 0.5 + ox) / sx
    expected_y = (np.arange(rows)[:, None] + 0.5 + oy) / sy
    slack = 1 + 0.02 * max(size)  # halving drops an odd last row or column
    assert np.abs(found_x - expected_x)[inner].max() < slack
    assert np.abs(found_y - expected_y)[inner].max() < slack


def test_a_square_is_the_same_as_a_side():
    image = Image.effect_noise((90, 37), 60)
    assert center_crop_arr(image, 8).tobytes() == center_crop_arr(image, (8, 8)).tobytes()
    assert crop_map((90, 37), 8) == crop_map((90, 37), (8, 8))
