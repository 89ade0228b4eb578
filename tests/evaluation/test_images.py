import numpy as np
import pytest
import torch
from PIL import Image

from conftest import tiny_model
from evaluation import images
from models.sampling.options import SamplingOptions
from util.dist import World
from util.errors import UserError
from util.pixels import TEXT, Alphabet

OPTIONS = SamplingOptions((2, 2), 1.0, "linear", 1.0, 1e-4)


@pytest.mark.parametrize(
    ("class_num", "labels"), [(4, [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4), (160, range(0, 160, 10))]
)
def test_a_sheet_shows_16_enlarged_images_of_classes_that_are_spread(monkeypatch, class_num, labels):
    asked, plain = [], images.draw
    monkeypatch.setattr(
        images, "draw", lambda model, labels, *rest: asked.extend(labels) or plain(model, labels, *rest)
    )
    model = tiny_model("mar", class_num=class_num)
    sheet = images.draw_sheet(model, [f"name {i}" for i in range(class_num)], "step 1", OPTIONS, 0)
    assert asked == list(labels)
    assert min(sheet.size) >= 4 * 96
    drawn = [np.asarray(image) for image in plain(model, labels, range(16), OPTIONS, 0)]
    first = np.asarray(sheet)[TEXT : TEXT + 96, :96]
    assert np.array_equal(
        first, np.asarray(Image.fromarray(drawn[0]).resize((96, 96), Image.Resampling.NEAREST))
    )
    assert np.array_equal(first[::12, ::12], drawn[0])


def test_captions_are_names_or_numbers_and_without_classes_there_are_none(monkeypatch):
    asked = []
    monkeypatch.setattr(images, "make_sheet", lambda *_, captions, **__: asked.append(list(captions)))
    for class_num, names in ((2, ["cat", "dog"]), (2, []), (0, [])):
        images.draw_sheet(tiny_model("mar", class_num=class_num), names, "step 1", OPTIONS, 0)
    assert asked == [["cat"] * 8 + ["dog"] * 8, ["class 0"] * 8 + ["class 1"] * 8, []]


class Drawer(torch.nn.Module):
    """Stands for a model of any grid and alphabet. Its values are a function of (seed, number of the image)."""

    class_num, arguments = 0, {"num_values": 50}

    def __init__(self, shape, alphabet):
        super().__init__()
        self.fake_latent = torch.nn.Parameter(torch.zeros(1))
        self.image_shape, self.alphabet, self.drawn = shape, alphabet, []

    def generate(self, labels, *, num_images, seed, indices, progress_bar, **options):
        self.drawn += indices
        return np.stack([self.values(seed, i) for i in indices])

    def values(self, seed: int, index: int) -> np.ndarray:
        shape = (*self.image_shape, self.alphabet.channels)
        return np.random.default_rng((seed, index)).integers(
            0, self.alphabet.num_values, shape, dtype=np.uint8
        )


@pytest.mark.parametrize(("shape", "channels"), [((16,), 4), ((4, 6, 8), 1), ((6, 8), 2)])
def test_what_is_no_image_is_written_as_arrays_each_once(shape, channels, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "sampling_dtype", lambda model, amp: torch.float32)
    model = Drawer(shape, Alphabet(channels, 50, "categorical"))
    how = dict(num_images=10, batch_size=3, seed=7, world=World(), progress_bar=False)
    figures = images.evaluate(model, tmp_path / "a", OPTIONS, **how)
    assert (figures["num_images"], figures["num_drawn"], sorted(model.drawn)) == (10, 10, list(range(10)))
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"manifest.json", *(f"{index:05d}.npy" for index in range(10))}
    for index in range(10):
        assert np.array_equal(np.load(tmp_path / "a" / f"{index:05d}.npy"), model.values(7, index))
    (tmp_path / "a" / "00004.npy").unlink()
    assert images.evaluate(model, tmp_path / "a", OPTIONS, **how)["num_drawn"] == 1
    with pytest.raises(
        UserError, match="only images of 8 bits have scores, and this model draws none; leave out --fid_stats"
    ):
        images.evaluate(model, tmp_path / "a", OPTIONS, scorer=object(), **how)


def test_a_sheet_shows_channels_below_each_other_and_slices_side_by_side():
    strip = np.arange(64, dtype=np.uint8).reshape(16, 4)
    assert np.array_equal(images.as_grey(strip, Alphabet(4, 256)), strip.T)
    volume = np.arange(4 * 6 * 8, dtype=np.uint8).reshape(4, 6, 8, 1)
    sheet = np.asarray(images.as_grey(volume, Alphabet(1, 256)))
    assert sheet.shape == (6, 32)
    assert all(np.array_equal(sheet[:, 8 * d : 8 * d + 8], volume[d, :, :, 0]) for d in range(4))
    bits = np.asarray(images.as_grey(np.array([[0, 1], [1, 1]], np.uint8), Alphabet(2, 2)))
    assert bits.tolist() == [[0, 255], [255, 255]]
    long = np.asarray(images.as_grey(strip.reshape(64, 1), Alphabet(1, 256)))
    assert long.shape == (8, 64)  # one row of cells, made eight pixels high
    sheet = images.draw_sheet(Drawer((64,), Alphabet(4, 50, "categorical")), [], "step 1", OPTIONS, 0)
    assert sheet.width >= 4 * 96
