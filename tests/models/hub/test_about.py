"""What a model says of itself, and which images it calls unlike its training images."""

import json

import numpy as np
import pytest
from PIL import Image

from conftest import random_values, tiny_model
from models.fractalgen import FractalGen
from models.hub import zoo
from models.hub.about import FAR, About, describe, quick_bits_per_dim, unlike_training


def test_it_is_kept_in_the_folder_and_may_be_missing(tmp_path):
    model = tiny_model()
    assert "about" not in model.config
    model.about = About("two photographs", "Draws noise of 8 px.", 7.5, 0.25)
    model.save_pretrained(tmp_path)
    assert FractalGen.from_pretrained(tmp_path).about == model.about
    config = json.loads((tmp_path / "config.json").read_text())
    del config["about"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert FractalGen.from_pretrained(tmp_path).about is None


def test_bits_of_held_out_images_are_measured(kind):
    model = tiny_model(kind)
    images = random_values(3, 8).permute(0, 2, 3, 1).numpy()
    bits = np.concatenate([quick_bits_per_dim(model, image) for image in images])
    steps = [min(4, generator.spec.num_patches) for generator in model.generators]
    options = dict(num_orders=1, num_inference_steps=steps, progress_bar=False)
    assert bits[0] == -model.log_likelihood(images[0], **options).bits[0] / 192
    about = About.of_model(model, images, "noise", "Draws noise.")
    assert about.bits_per_dim == pytest.approx(bits.mean(), abs=1e-3)
    assert about.bits_per_dim_std == pytest.approx(bits.std(ddof=1), abs=1e-3)


def test_an_image_is_unlike_the_training_images_if_its_bits_are_far_above(monkeypatch):
    model = tiny_model()
    image = random_values(1, 8)[0].permute(1, 2, 0).numpy()
    assert unlike_training(model, image) is None
    model.about = About("emoji", "Draws emoji.")
    assert unlike_training(model, image) is None
    bits = quick_bits_per_dim(model, image)[0]
    for margin, unlike in ((-0.01, True), (0.01, False)):
        model.about = About("emoji", "Draws emoji.", float(bits - FAR * 0.5 + margin), 0.5)
        assert (unlike_training(model, image) is not None) == unlike


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_bundled_model_knows_a_photograph_from_an_emoji():
    from conftest import ROOT

    skimage = pytest.importorskip("skimage.data", reason="pip install scikit-image")
    model = zoo.load("emoji", "cpu")
    photograph = Image.fromarray(skimage.coffee()).resize((32, 32))
    assert "7.5 bits per dimension, held-out images 2.1 ± 1.0" in unlike_training(model, photograph)
    emoji = sorted((ROOT / "tests" / "golden" / "emoji" / "val").glob("*/*.png"))
    assert len(emoji) == 5
    assert [path for path in emoji if unlike_training(model, Image.open(path))] == []


def test_the_line_names_size_data_and_limits():
    model = tiny_model()
    assert describe(model, "mine").startswith("mine: 0.0486 M parameters, 8 x 8 pixels, 4 classes. ")
    assert describe(model, "mine").endswith("What it was trained on is not recorded.")
    assert "photographs need the published weights or your own" in describe(zoo.load("emoji", "cpu"), "x")
