"""The demo's data set and baselines; its training is what `make demo` shows."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))
import digits


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "data"
    digits.write_digits(folder)
    return folder


def test_every_scan_is_in_one_split_with_its_label_and_greys(data):
    scans = load_digits()
    paths = sorted(data.glob("*/*/*.png"), key=lambda path: path.stem)
    assert [int(path.stem) for path in paths] == list(range(1797))
    assert [int(path.parent.name) for path in paths] == scans.target.tolist()
    for path in paths[::100]:
        assert np.array_equal(np.asarray(Image.open(path)), np.round(scans.images[int(path.stem)] * 255 / 16))
    share = len(list((data / "val").glob("*/*.png"))) / 1797
    assert abs(share - 0.2) < 0.001


def test_baselines_are_what_the_files_hold(data):
    found = digits.baselines(data)
    assert found["uniform"] == 8
    assert 0.7 < found["per-pixel histogram"] < 1.0
    # A bound no coder without a model of several pixels can beat by much: the entropy of validation greys themselves.
    val, _ = digits.read_split(data / "val")
    counts = np.bincount(val[..., 0].flatten(), minlength=256) / val[..., 0].size
    entropy = -(counts[counts > 0] * np.log2(counts[counts > 0])).sum() / 3
    assert found["per-pixel histogram"] < entropy < found["PNG, all in one sheet"]
    assert found["WebP, all in one sheet"] < found["PNG, all in one sheet"] < found["PNG, a file an image"]


def test_the_reader_reads_real_scans(data):
    val, labels = digits.read_split(data / "val")
    asked = [
        Image.fromarray(val[np.where(labels == digit)[0][i]])
        for digit in range(10)
        for i in range(digits.PER_CLASS)
    ]
    read, right = digits.share_read_as_asked(data, asked)
    assert read > 0.9
    assert right > 0.9
    assert digits.share_read_as_asked(data, asked[::-1])[0] < 0.2
