"""The data set and the baselines of demo/digits.py, and the command that it prints."""

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))
import common
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


def test_baselines_agree_with_the_files(data):
    found = digits.baselines(data)
    assert found["uniform over 17 values"] == np.log2(17)
    # A coder that models each pixel on its own cannot beat the entropy of the validation values by much.
    scans = load_digits().images.astype(int)
    val, _ = digits.read_split(data / "val", "L")
    assert np.array_equal(np.unique(digits.VALUES.from_bytes(val)), np.unique(scans))
    counts = np.bincount(digits.VALUES.from_bytes(val).flatten()) / val.size
    entropy = -(counts * np.log2(counts)).sum()
    assert 2.3 < found["per-pixel histogram"] < found["xz, all in one file"] < entropy
    assert entropy < found["PNG, all in one sheet"]
    assert found["WebP, all in one sheet"] < found["PNG, all in one sheet"] < found["PNG, one file per image"]


def test_the_regression_classifies_real_scans(data):
    val, labels = digits.read_split(data / "val")
    scans = [
        Image.fromarray(val[np.where(labels == digit)[0][i]])
        for digit in range(10)
        for i in range(digits.PER_CLASS)
    ]
    share, accuracy = digits.classify_by_regression(data, scans)
    assert share > 0.9
    assert accuracy > 0.9
    assert digits.classify_by_regression(data, scans[::-1])[0] < 0.2


def test_the_command_that_is_printed_is_the_one_that_runs(monkeypatch, capsys):
    ran = []

    def run(words, **options):
        ran.append(words)
        return SimpleNamespace(returncode=0, stdout="")

    monkeypatch.setattr(common.subprocess, "run", run)
    paths = dict(data_path=common.ROOT / "output" / "a folder", output_dir=Path("/elsewhere"))
    common.run_main(f"{digits.MODEL} {digits.TRAINING}", **paths)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert all(line.startswith("    --") for line in printed.splitlines()[1:])
    assert shlex.split(printed.replace("\\\n", ""))[1:] == ran[0][1:]
    assert ran[0][-4:] == ["--data_path", "output/a folder", "--output_dir", "/elsewhere"]
