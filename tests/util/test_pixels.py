import numpy as np
import torch
from torchvision.transforms.functional import normalize as torchvision_normalize

from conftest import random_values
from util import pixels


def test_normalize_equals_torchvision_and_levels_come_back():
    values = random_values(2, 16)
    x = pixels.normalize(values)
    torch.testing.assert_close(x, torchvision_normalize(values / 255, pixels.MEAN, pixels.STD))
    assert torch.equal(pixels.to_uint8(x), values)
    every = torch.arange(256).repeat(3, 1)[None]
    assert torch.equal(pixels.to_values(pixels.normalize(every)), every)
    assert torch.equal(pixels.to_values(pixels.normalize(every).bfloat16()), every)


def test_to_pil_is_the_image():
    values = random_values(1, 8)
    (image,) = pixels.to_pil(pixels.normalize(values))
    assert np.array_equal(np.asarray(image), values[0].permute(1, 2, 0).numpy())
