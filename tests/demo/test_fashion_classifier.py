"""demo/fashion_classifier.py learns classes, and trains only where its file is missing."""

import fashion_classifier
import numpy as np
from fashion_classifier import Classifier


def bars(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images whose class is the place of a bright bar, with noise."""
    rng = np.random.default_rng(count)
    labels = np.arange(count) % 10
    images = rng.integers(0, 60, (count, 28, 28))
    for image, label in zip(images, labels, strict=True):
        image[2 * label + 3 : 2 * label + 6] += 150
    return images.astype(np.uint8), labels.astype(np.uint8)


def test_it_learns_once_and_keeps_what_it_learnt(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(fashion_classifier, "read_fashion", lambda *where: calls.append(where) or bars(160))
    monkeypatch.setattr(fashion_classifier, "BATCH", 8)
    monkeypatch.setattr(fashion_classifier, "EPOCHS", 2)
    file = tmp_path / "new" / "classifier.pt"
    images, labels = bars(100)
    for _ in range(2):
        classifier = Classifier.trained(tmp_path, file)
        assert (classifier(images) == labels).mean() > 0.9
    assert calls == [(tmp_path, "train")]
    assert np.array_equal(classifier(images[:7]), classifier(images)[:7])
    assert [path.name for path in file.parent.iterdir()] == ["classifier.pt"]
