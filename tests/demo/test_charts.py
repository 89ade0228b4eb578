import sys
import types

import charts
import torch
from PIL import Image

from conftest import tiny_model
from util.pixels import make_sheet


def test_sheet_places_images_row_by_row():
    colours = ["red", "green", "blue"]
    sheet = make_sheet(
        [Image.new("RGB", (4, 4), colour) for colour in colours], columns=2, zoom=3, row_labels=["a", "b"]
    )
    found = [
        sheet.getpixel(xy)
        for xy in ((sheet.width - 20, 4), (sheet.width - 6, 4), (sheet.width - 20, sheet.height - 6))
    ]
    assert found == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]


def test_boxes_keep_their_colours_on_a_grey_image():
    sheet = charts.outline(Image.new("L", (4, 4), 200), [((0, 0, 4, 4), "#ff2d95")])
    assert (sheet.getpixel((0, 0)), sheet.getpixel((128, 128))) == ((255, 45, 149), (200, 200, 200))


def test_visualize_shows_the_canvas_in_a_notebook_and_ipython_is_imported_only_then(monkeypatch):
    shown = []

    class Handle:
        def update(self, image):
            shown.append(image)

    def display(image, display_id):
        shown.append(image)
        return Handle()

    fake = types.ModuleType("IPython.display")
    fake.display = display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    model = tiny_model("mar")
    model.sample([model.fake_latent] * 5, (4, 2))
    assert not shown
    seen = []
    model.sample([model.fake_latent] * 5, (4, 2), visualize=True, on_step=lambda *step: seen.append(step))
    assert len(shown) == len(seen) == 4
    assert all(isinstance(image, Image.Image) for image in shown)
    assert isinstance(seen[0][2], torch.Tensor)
