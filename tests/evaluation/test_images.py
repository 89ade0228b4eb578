import numpy as np
import pytest
from PIL import Image

from conftest import tiny_model
from evaluation import images
from models.sampling.options import SamplingOptions

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
    first = np.asarray(sheet)[16 : 16 + 96, :96]
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
