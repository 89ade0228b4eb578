"""No way to load weights runs code that is hidden in a file."""

import argparse
import json
from collections import OrderedDict
from contextlib import suppress

import hostile
import pytest
import torch
from PIL import Image

import main_fractalgen
from models import fractalgen
from util import checkpoint
from util.errors import UserError

KINDS = {**hostile.RUNS_CODE, **hostile.ODD}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(pickle protocol|TorchScript archive|sparse tensor|TypedStorage)"
)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def path(kind, tmp_path):
    KINDS[kind](tmp_path / checkpoint.NAME, tmp_path / "canary")
    assert not (tmp_path / "canary").exists()
    return tmp_path / checkpoint.NAME


@pytest.mark.parametrize("kind", hostile.RUNS_CODE)
def test_a_careless_load_would_run_it(kind, path, tmp_path):
    """Otherwise the tests below could not fail."""
    with suppress(Exception):  # many files fail to load after their code has run
        torch.load(path, weights_only=False)
    assert (tmp_path / "canary").exists()


def test_it_is_refused_in_one_line(path, tmp_path):
    with pytest.raises(UserError) as error:
        checkpoint.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).isprintable()
    assert not (tmp_path / "canary").exists()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        (folder / split / "any").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / split / "any" / "0.png")
    return folder


@pytest.mark.parametrize("way", ["--evaluate_nll --ema", "--ema"])
def test_every_way_to_resume_refuses_it_and_names_the_file(way, path, data, tmp_path, capsys):
    flags = f"--model fractalar_tiny_in8 --class_num 1 --device cpu --num_workers 0 --amp off --batch_size 1 --epochs 1 {way}"
    folders = ["--resume", str(path), "--data_path", str(data), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        main_fractalgen.main([*flags.split(), *folders])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"main_fractalgen.py: error: {path}: ")
    assert line.isprintable()
    assert not (tmp_path / "canary").exists()


class OddSettings:
    """Pickles as a Namespace whose attributes hide all of its methods and whose class is replaced."""

    def __reduce__(self):
        hidden = [*dir(argparse.Namespace), "__setstate__", "__deepcopy__", "model", "lr"]
        slots = {"__class__": torch.storage.TypedStorage}
        return argparse.Namespace, (), (dict.fromkeys(hidden, OrderedDict), slots)


@pytest.mark.parametrize("way", ["--evaluate_nll --ema", "--ema"])
def test_what_a_checkpoint_says_of_its_settings_changes_nothing(way, data, tmp_path, capsys):
    """Only a Namespace may be built, but torch lets a file set any of its attributes, even `__class__`."""
    model = fractalgen.fractalar_tiny_in8(class_num=1).state_dict()
    flags = f"--model fractalar_tiny_in8 --class_num 1 --device cpu --num_workers 0 --amp off --batch_size 1 --epochs 1 {way}"
    seen = []
    for name, settings in (("usual", argparse.Namespace(lr=1.0)), ("odd", OddSettings())):
        torch.save({"model": model, "model_ema": model, "args": settings}, path := tmp_path / f"{name}.pth")
        folders = ["--resume", str(path), "--data_path", str(data), "--output_dir", str(tmp_path / name)]
        main_fractalgen.main([*flags.split(), "--num_iter_list", "1,1", *folders])
        trained = tmp_path / name / checkpoint.NAME
        seen.append(
            checkpoint.load(trained)["model"] if trained.exists() else json.loads(capsys.readouterr().out)
        )
    assert type(torch.load(path)["args"]) is torch.storage.TypedStorage
    assert repr(seen[0]) == repr(seen[1])
