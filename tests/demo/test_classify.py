"""demo/classify.py: accuracies of a model and of a logistic regression on the same held-out images."""

import re

import pytest
import torch
from PIL import Image

from conftest import opinionated, random_values, save_image, tiny_model
from demo import classify


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
