"""demo/classify.py: accuracies of the model and of a logistic regression, on the same held-out images."""

import re

import pytest
import torch
from PIL import Image

from conftest import opinionated, random_levels, save_image, tiny_model
from demo import classify


@pytest.fixture
def data(tmp_path):
    """Four classes, each of its brightness, six images for training and three held out; one held-out image of another."""
    for split, n in (("train", 6), ("val", 3)):
        for label in range(4):
            for i in range(n):
                bright = random_levels(1, 8, seed=100 * label + 10 * n + i)[0] // 8 + 60 * (
                    3 if (split, label, i) == ("val", 0, 0) else label
                )
                save_image(tmp_path / split / str(label) / f"{i}.png", bright)
    return tmp_path


def test_it_prints_both_accuracies(data, tmp_path, capsys):
    model = opinionated(tiny_model("ar"))
    model.save_pretrained(tmp_path / "model")
    classify.main([str(tmp_path / "model"), str(data)])
    said = capsys.readouterr().out
    images = [Image.open(path) for path in sorted(data.glob("val/*/*.png"))]
    labels = torch.arange(4).repeat_interleave(3)
    posterior = model.classify(images, progress_bar=False)
    right, regression = (float(share) for share in re.findall(r"([\d.]+)%", said))
    assert right == pytest.approx(100 * (posterior.argmax(1) == labels).double().mean().item(), abs=0.01)
    assert regression == pytest.approx(100 * 11 / 12, abs=0.01)
    log_score = -posterior.gather(1, labels[:, None]).log().mean().item()
    assert float(re.search(r"true class ([\d.]+) nats", said)[1]) == pytest.approx(log_score, abs=1e-3)
