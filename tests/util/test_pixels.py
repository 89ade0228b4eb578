import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import normalize as torchvision_normalize

from conftest import random_values
from util import pixels
from util.errors import UserError
from util.pixels import RGB, Alphabet


def test_normalize_equals_torchvision_and_levels_come_back():
    values = random_values(2, 16)
    x = RGB.normalize(values)
    torch.testing.assert_close(x, torchvision_normalize(values / 255, *pixels.IMAGENET))
    assert torch.equal(RGB.to_values(x), values)
    every = torch.arange(256).repeat(3, 1)[None]
    assert torch.equal(RGB.to_values(RGB.normalize(every)), every)
    assert torch.equal(RGB.to_values(RGB.normalize(every).bfloat16()), every)


@pytest.mark.parametrize("kind", pixels.VALUE_KINDS)
@pytest.mark.parametrize("num_values", [2, 17, 300, 65536])
def test_every_value_comes_back_from_its_normalised_value(num_values, kind):
    alphabet = Alphabet(2, num_values, kind)
    every = torch.arange(num_values).repeat(2, 1)[None]
    x = alphabet.normalize(every.to(alphabet.dtype))
    assert torch.equal(alphabet.to_values(x), every)
    assert x.max() == pytest.approx(2.0 if kind == "ordinal" else num_values - 1)
    assert np.array_equal(alphabet.to_numpy(x)[0], every[0].T.numpy())


def test_values_are_stored_in_as_few_bytes_as_they_need():
    for num_values, dtype in ((256, np.uint8), (257, np.uint16)):
        alphabet = Alphabet(2, num_values)
        top = torch.full((1, 2, 3), num_values - 1)
        found = alphabet.to_numpy(alphabet.normalize(top))
        assert (found.dtype, found.shape, found.max()) == (dtype, (1, 3, 2), num_values - 1)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((20, 28), "28 x 20 pixels"), ((64,), "64 cells"), ((8, None, 16), "8 x any x 16 cells")],
)
def test_a_shape_in_words_has_the_width_of_images_first(shape, words):
    assert pixels.in_words(shape) == words


def test_one_constant_for_all_channels_normalises_as_one_for_each():
    values = random_values(2, 4)
    same = Alphabet(3, mean=[0.3] * 3, std=[0.7] * 3).normalize(values)
    each = Alphabet(3, mean=[0.3, 0.3, 0.5], std=[0.7, 0.7, 0.6]).normalize(values)
    assert torch.equal(same[:, :2], each[:, :2])
    assert not torch.equal(same[:, 2], each[:, 2])


def test_normalisation_is_that_of_each_channel():
    alphabet = Alphabet(2, 5, mean=[0.0, 0.5], std=[1.0, 2.0])
    x = alphabet.normalize(torch.tensor([[2, 4]]))
    assert x.tolist() == [[0.5, 0.25]]
    assert Alphabet(3).mean == pixels.IMAGENET[0]
    assert Alphabet(1).mean == (0.5,)


@pytest.mark.parametrize("num_values", [2, 3, 17, 32, 100, 255, 256])
def test_few_values_are_stored_in_8_bits_and_come_back(num_values):
    alphabet, values = Alphabet(1, num_values), np.arange(num_values)
    samples = alphabet.to_bytes(values)
    assert samples.tolist() == [round(255 * v / (num_values - 1)) for v in range(num_values)]
    assert np.array_equal(alphabet.from_bytes(samples), values)
    every = np.arange(256, dtype=np.uint8)
    assert alphabet.from_bytes(every).tolist() == [round(x * (num_values - 1) / 255) for x in range(256)]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_to_pil_is_the_image(channels, mode):
    values = random_values(1, 8).repeat(1, 2, 1, 1)[:, :channels]
    alphabet = Alphabet(channels)
    (image,) = alphabet.to_pil(alphabet.normalize(values))
    assert image.mode == mode
    assert np.array_equal(np.asarray(image).reshape(8, 8, channels), values[0].permute(1, 2, 0).numpy())


def test_images_have_two_axes_few_values_and_a_mode():
    assert Alphabet(4, 2).is_image((8, 6))
    assert Alphabet(1, 256, "categorical").is_image((8, 6))
    assert not Alphabet(2).is_image((8, 6))
    assert not Alphabet(1, 257).is_image((8, 6))
    assert not Alphabet(1).is_image((8,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(channels=0), "channels 0 must be from 1 to 4096"),
        (dict(num_values=1), "num_values 1 must be from 2 to 65536"),
        (dict(num_values=65537), "num_values 65537 must be from 2 to 65536"),
        (dict(value_kind="text"), "value_kind 'text' must be one of ordinal, categorical"),
        (dict(mean=[0.5]), r"mean \[0.5\] must be 3 numbers, one for each channel"),
        (dict(std=[1, 1, float("nan")]), "std .* must be 3 numbers"),
        (dict(std=[1, 0, 1]), r"std \[1, 0, 1\] must be 3 numbers, one for each channel, and above 0"),
        (dict(value_kind="categorical", mean=[0.5] * 3), "mean is for ordinal values"),
    ],
)
def test_an_alphabet_that_cannot_be_is_an_error_of_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        Alphabet(**arguments)


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
