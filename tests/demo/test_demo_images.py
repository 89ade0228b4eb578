"""demo/images.py: the pictures of the documentation, drawn with tiny models in the place of the bundled ones."""

import shlex
import sys
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageColor

from conftest import ROOT, opinionated, tiny_model
from models.hub import zoo
from models.likelihood.inside import look_inside
from util.pixels import TEXT

sys.path.insert(0, str(ROOT / "demo"))
import images
import recursion

NAMES = tuple(path.stem for path in sorted((images.EXAMPLES / "fashion").glob("*.png")))


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """Tiny models of 28 px in grey and of 8 px in colour, of few steps, under the bundled models' names."""
    grey = opinionated(tiny_model("mar", img_size_list=[28, 7, 1], class_num=10, channels=1))
    models = {"fashion_ar": grey, "fashion_mar": grey, "emoji": opinionated(tiny_model("guided"))}
    for name, model in models.items():
        model.sampling_defaults = replace(model.sampling_defaults, num_inference_steps=(4, 4))
        model.class_names = NAMES if name != "emoji" else ("face", "heart", "person", "flag")
        model.save_pretrained(tmp_path / name)
    monkeypatch.setattr(zoo, "BUNDLED", {name: tmp_path / name for name in models})
    monkeypatch.setattr(images, "ROOT", tmp_path)
    monkeypatch.setattr(images, "FRAMES", 5)
    for folder in ("demo", "docs"):
        (tmp_path / folder).mkdir()
    return tmp_path


def test_growth_shows_both_models_side_by_side_and_what_is_undecided(bundled):
    images.main(["demo/visual.gif"])
    growth = Image.open(bundled / "demo" / "visual.gif")
    assert growth.n_frames == images.FRAMES
    width = 2 * images.CELL + 2 * (images.CELL // 28)  # of two images and their gaps
    assert growth.width == width + 2 * images.CELL + 2 * (images.CELL // 8)
    shares = []
    for number in range(images.FRAMES):
        growth.seek(number)
        near = np.abs(np.asarray(growth.convert("RGB")).astype(int) - ImageColor.getrgb(recursion.UNDECIDED))
        shares.append((near.max(-1) < 4).mean())
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.7
    assert shares[-1] < 0.05


def test_growth_shows_what_is_bundled_alone_and_refuses_where_nothing_is(bundled, capsys):
    (bundled / "emoji" / "model.safetensors").unlink()
    images.main(["demo/visual.gif"])
    assert Image.open(bundled / "demo" / "visual.gif").width == 2 * images.CELL + 2 * (images.CELL // 28)
    (bundled / "fashion_ar" / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match="2"):
        images.main(["demo/visual.gif"])
    assert "fashion_ar and emoji, of which none is bundled here" in capsys.readouterr().err


def test_edits_keep_the_known_pixels_and_maps_show_the_shoe(bundled, monkeypatch):
    monkeypatch.setattr(images, "RECURSION", ("emoji", "face", 0, (3, 5)))
    monkeypatch.setattr(images, "RESULTS", 1)
    monkeypatch.setattr(images, "LIKELIHOOD", f"{images.LIKELIHOOD} --classes 0 --num_orders 1")
    images.main(["demo/edits.png", "docs/likelihood.png", "docs/recursion.svg"])
    edits = np.asarray(Image.open(bundled / "demo" / "edits.png"))
    coat = np.asarray(Image.open(images.EXAMPLES / "fashion" / "coat.png"))
    (row, column) = 27, 20  # known: outside the box of the sleeve
    left = edits.shape[1] // 3
    for tile in range(3):
        # each pixel is a square of 6; TEXT pixels of a title are above
        y, x = TEXT + 6 * row + 3, tile * left + 6 * column + 3
        assert (edits[y, x] == coat[row, column]).all()
    assert Image.open(bundled / "docs" / "likelihood.png").width > 3 * 252
    assert ElementTree.parse(bundled / "docs" / "recursion.svg").getroot().get("width") == "830"


@pytest.mark.parametrize(("kind", "channels"), [("guided", 3), ("ar", 1)])
def test_the_drawing_of_the_recursion_says_what_was_drawn(kind, channels):
    model = opinionated(tiny_model(kind, channels=channels))
    image = model.generate([1], seed=0, progress_bar=False)[0]
    inside = look_inside(model, image, (5, 2), 1, seed=0)
    drawn = recursion.draw_recursion(image, inside, model.alphabet)
    words = " ".join(ElementTree.fromstring(drawn).itertext())
    for place, value in enumerate(inside.places[-1].values.tolist()):
        assert f"{inside.places[-1].entropy[place]:.1f} bits, drawn {value}" in words
    assert f"step {inside.places[0].step + 1} of {inside.places[0].num_steps}" in words
    assert ("neighbours" in words) == (kind == "guided")  # an AR model here has one condition


def test_a_name_that_is_no_picture_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        images.main(["demo/nothing.png"])
    assert "demo/nothing.png: no picture; one of demo/visual.gif, " in capsys.readouterr().err


def test_editing_md_has_the_commands_of_the_pictures():
    page = (ROOT / "docs" / "editing.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [
        shlex.split(line, comments=True) for line in page.splitlines() if line.startswith("python demo/")
    ]
    said = [[word.removeprefix("demo/examples/fashion/") for word in words] for words in lines]
    for script, flags in [
        *(("edit", flags) for flags in images.EDITS.values()),
        ("likelihood", images.LIKELIHOOD),
    ]:
        wanted = ["python", f"demo/{script}.py", *shlex.split(flags)]
        assert any(words[: len(wanted)] == wanted for words in said), flags


def test_the_pictures_are_where_the_pages_look_for_them():
    for name in images.PICTURES:
        assert (ROOT / name).exists()
