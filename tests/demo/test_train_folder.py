"""demo/train_folder.py chooses settings that fit images and time, and writes a model that loads."""

import json
import sys
import unittest.mock
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from conftest import random_values, run_here, save_image
from models.hub import zoo
from util.data.loader import open_split
from util.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))
import train_folder


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "pets"
    for number, values in enumerate(random_values(20, 8)):
        save_image(folder / ("cat", "dog")[number % 2] / f"{number:02d}.png", values)
    return folder


def test_one_command_gives_a_model_a_sheet_and_bits_per_dim(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_folder, "run_main", run_here)
    monkeypatch.setattr(train_folder, "measure", lambda model, batch, *_: 0.1 * batch)
    out = tmp_path / "out"
    argv = ["train_folder.py", str(images), "--hours", "0.002", "--output_dir", str(out), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    train_folder.main()
    said = capsys.readouterr().out
    assert "class folders, every 10th for validation, 18 images of 2 classes to train on" in said
    assert "s of training\n" in said
    assert "WebP, one file per image" in said
    assert "this model, a bound" in said
    model = zoo.load(out / "model", "cpu")
    assert model.class_names == ("cat", "dog")
    assert Image.open(out / "samples.png").width > train_folder.PER_CLASS * 96
    settings = json.loads((out / "run" / "settings.json").read_text())["settings"]
    plan = json.loads((out / "plan.json").read_text())
    assert {name: settings[name] for name in ("model", "batch_size", "epochs", "lr")} == {
        name: plan[name] for name in ("model", "batch_size", "epochs", "lr")
    }
    train_folder.main()  # goes on, with the same settings and nothing left to train
    assert "plan.json are taken again" in capsys.readouterr().out


def test_a_step_is_measured_by_a_dry_run(images):
    run = unittest.mock.Mock(return_value='{"run": {"seconds": 0.25}}')
    with unittest.mock.patch.object(train_folder, "run_main", run):
        assert train_folder.measure("fractalmar_tiny_in8", 4, images, "--device cpu") == 0.25
    flags = "--model fractalmar_tiny_in8 --batch_size 4 --num_workers 0 --dry_run --device cpu"
    run.assert_called_once_with(flags, capture=True, quiet=True, data_path=images)


@pytest.mark.parametrize(
    ("side", "hours", "model", "batch"),
    [
        (8, 1, "fractalmar_tiny_in8", 64),
        (40, 1, "fractalar_tiny_in32", 8),
        (40, 0.3, "fractalar_tiny_in32", 4),
        (40, 0.1, "fractalar_tiny_in16", 4),
        (40, 0.01, "fractalmar_tiny_in8", 32),
        (500, 10, "fractalar_tiny_in64", 32),
        (500, 1, "fractalar_tiny_in32", 8),
        (500, 0.001, "fractalmar_tiny_in8", 4),
    ],
)
def test_the_largest_model_is_taken_that_has_time_for_enough_steps(
    side, hours, model, batch, monkeypatch, tmp_path
):
    seconds = {"mar_tiny_in8": 1e-3 / 4, "ar_tiny_in16": 0.03, "ar_tiny_in32": 0.1, "ar_tiny_in64": 0.4}
    monkeypatch.setattr(
        train_folder, "measure", lambda name, batch, *_: seconds[name.removeprefix("fractal")] * batch
    )
    for number in range(72):
        path = tmp_path / "a" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (side, side + number), (number, 0, 0)).save(path)
    plan = train_folder.choose(open_split(tmp_path, "train"), tmp_path, hours, "")
    assert (plan["model"], plan["batch_size"]) == (model, batch)
    steps = plan["epochs"] * (64 // batch)
    assert 0.8 < steps * plan["seconds"] / (hours * 3600 * train_folder.OVERHEAD) <= 1


def test_images_that_cannot_be_scaled_need_a_model_of_their_size(tmp_path, monkeypatch):
    source = SimpleNamespace(shape=(24, 24), kind="packed images of 24 px")
    with pytest.raises(UserError, match="packed images of 24 px, but there are models of 64, 32, 16, 8 px"):
        train_folder.choose(source, tmp_path, 1, "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("/nowhere", "/nowhere: no such folder; --data_path must hold images"),
        ("{0} --hours 0", "--hours 0.0 must be at least 0.001"),
        ("{0} --output_dir {0}/cat/00.png", "cat/00.png: cannot be written"),
    ],
)
def test_bad_input_is_one_line(flags, message, images, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_folder.py", *flags.format(images).split()])
    with pytest.raises(SystemExit) as stop:
        train_folder.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.count("\n") == 1
