import numpy as np
import pytest
import torch
from PIL import Image

from util.crop import center_crop_arr, fast_center_crop
from util.data.decode import open_rgb
from util.data.loader import ImageFolderDataset


@pytest.fixture
def photograph():
    """Smooth, with an edge: 300 x 225."""
    y, x = np.mgrid[:225, :300] / 300
    levels = np.stack([255 * x, 255 * y, 127 + 100 * np.sin(9 * x * y) + 20 * (x > 0.5)], axis=-1)
    return Image.fromarray(levels.round().astype(np.uint8))


def adm(image, size):
    return torch.from_numpy(np.array(center_crop_arr(image, size))).permute(2, 0, 1).int()


def test_where_nothing_is_halved_the_fast_crop_differs_by_a_rounding(photograph):
    difference = (fast_center_crop(photograph, 128).int() - adm(photograph, 128)).abs()
    assert difference.max() <= 2
    assert (difference == 0).float().mean() > 0.95


def test_a_jpeg_is_decoded_small_but_not_too_small(photograph, tmp_path):
    photograph.save(tmp_path / "a.jpg", quality=95)
    assert open_rgb(tmp_path / "a.jpg", at_least=64).size == (150, 113)
    assert open_rgb(tmp_path / "a.jpg", at_least=32).size == (75, 57)
    assert open_rgb(tmp_path / "a.jpg", at_least=200).size == (300, 225)
    fast = fast_center_crop(open_rgb(tmp_path / "a.jpg", at_least=64), 32).int()
    assert (
        fast - adm(open_rgb(tmp_path / "a.jpg"), 32)
    ).abs().float().mean() < 4  # levels; the cut may lie a pixel elsewhere


def test_fast_items_look_like_the_exact_ones(photograph, tmp_path):
    (tmp_path / "class").mkdir()
    photograph.save(tmp_path / "class" / "a.jpg", quality=95)
    fast, exact = (
        ImageFolderDataset(tmp_path, 32, flip=True, seed=0, fast=fast)[1, 0] for fast in (True, False)
    )
    assert fast[0].shape == exact[0].shape == (3, 32, 32)
    assert fast[0].dtype == torch.uint8
    assert (fast[0].int() - exact[0].int()).abs().float().mean() < 4
    assert fast[1:] == exact[1:]
