"""demo/classify.py: accuracies of a model and of a logistic regression on the same held-out images."""

import re
import shutil

import pytest
import torch
from PIL import Image

from conftest import opinionated, random_values, save_image, tiny_model
from demo import classify
from models.fractalgen import FractalGen


@pytest.fixture
def data(tmp_path):
    """Writes four classes that differ in brightness: six images each for training, three held out.

    The first held-out image of class 0 looks like one of class 3.
    """
    for split, n in (("train", 6), ("val", 3)):
        for label in range(4):
            for i in range(n):
                brightness = 3 if (split, label, i) == ("val", 0, 0) else label
                image = random_values(1, 8, seed=100 * label + 10 * n + i)[0] // 8 + 60 * brightness
                save_image(tmp_path / split / str(label) / f"{i}.png", image)
    return tmp_path


def test_it_prints_both_accuracies(data, tmp_path, capsys):
    model = opinionated(tiny_model("ar"))
    model.save_pretrained(tmp_path / "model")
    classify.main([str(tmp_path / "model"), str(data)])
    printed = capsys.readouterr().out
    images = [Image.open(path) for path in sorted(data.glob("val/*/*.png"))]
    labels = torch.arange(4).repeat_interleave(3)
    posterior = model.classify(images, progress_bar=False)
    accuracy, regression = (float(share) for share in re.findall(r"([\d.]+)%", printed))
    assert accuracy == pytest.approx(100 * (posterior.argmax(1) == labels).double().mean().item(), abs=0.01)
    assert regression == pytest.approx(100 * 11 / 12, abs=0.01)
    nats = -posterior.gather(1, labels[:, None]).log().mean().item()
    assert float(re.search(r"true class ([\d.]+) nats", printed)[1]) == pytest.approx(nats, abs=1e-3)


def change(data, what: str) -> None:
    """Spoils a data set in one way."""
    if what == "class":
        save_image(data / "val" / "9" / "0.png", random_values(1, 8)[0])
    elif what == "class of train":
        shutil.rmtree(data / "train" / "3")
    elif what == "size":
        save_image(data / "train" / "0" / "x.png", random_values(1, 9)[0])
    elif what == "image":
        (data / "val" / "0" / "x.png").write_text("no image")
    elif what == "val":
        shutil.rmtree(data / "val")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("class", "val has 5 classes, .*model 4"),
        ("class of train", "train has 3 classes, .*model 4"),
        ("size", "train/0/x.png: is not of the size of .*; all images must have one size"),
        ("image", "val/0/x.png: cannot be read as an image"),
        ("val", "val: there are no images CLASS/"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_the_work(what, message, data, tmp_path, monkeypatch, capsys):
    tiny_model("ar").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(FractalGen, "classify", None)
    change(data, what)
    with pytest.raises(SystemExit, match="2"):
        classify.main([str(tmp_path / "model"), str(data)])
    error = capsys.readouterr().err
    assert re.search(f"^classify.py: error: .*{message}", error)
    assert error.count("\n") == 1
