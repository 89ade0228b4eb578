import numpy as np
import torch
from PIL import Image
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


def test_a_sheet_has_a_title_and_a_caption_below_each_enlarged_image():
    images = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    captions = ["a long name that is cut", "\n猫\udcd0", ""]  # folders may have any name
    sheet = np.asarray(pixels.make_sheet(images, 2, zoom=10, captions=captions, title="step 5"))
    text, pitch = pixels.TEXT, 40 + 10 + pixels.TEXT
    assert sheet.shape == (text + 2 * pitch, 100, 3)
    dark = lambda y, x: (sheet[y : y + text, x : x + 40] < 128).all(-1)  # noqa: E731
    assert dark(0, 0).any()
    for number, colour in enumerate(((255, 0, 0), (0, 0, 255), (0, 255, 0))):
        x, y = 50 * (number % 2), text + pitch * (number // 2)
        assert (sheet[y : y + 40, x : x + 40] == colour).all()
        assert dark(y + 40, x).any() == bool(captions[number])
    assert not (sheet[text + 40 : text + pitch, 41:50] < 128).all(-1).any()  # between the captions
