import argparse
import os
import pickle
import random

import numpy as np
import pytest
import torch

from conftest import tiny_model
from util import checkpoint
from util.errors import UserError


def content() -> dict:
    return {"model": tiny_model().state_dict(), "optimizer": {}, "epoch": 3, "scaler": {}, "args": argparse.Namespace(lr=1.0)}


def test_published_format_round_trip(tmp_path):
    path = tmp_path / checkpoint.NAME
    checkpoint.save(path, content())
    loaded = checkpoint.load(path)
    assert list(loaded) == ["model", "optimizer", "epoch", "scaler", "args"]
    assert loaded["args"] == argparse.Namespace(lr=1.0)
    assert torch.equal(loaded["model"]["fake_latent"], content()["model"]["fake_latent"])
    assert [file.name for file in tmp_path.iterdir()] == [checkpoint.NAME]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / checkpoint.NAME
    checkpoint.save(path, content())
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoint.save(path, {"model": lambda: None})
    assert checkpoint.load(path)["epoch"] == 3
    assert [file.name for file in tmp_path.iterdir()] == [checkpoint.NAME]


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, zipped):
    path, proof = tmp_path / "hostile.pth", tmp_path / "it ran".replace(" ", "_")
    torch.save({"model": {}, "epoch": Hostile(proof)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"hostile.pth: refused.*system") as error:
        checkpoint.load(path)
    assert not proof.exists()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 1, 100, 3000, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / checkpoint.NAME
    checkpoint.save(path, content())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{checkpoint.NAME}: (cannot be read|refused), it is damaged") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


def test_missing_file_and_file_without_weights(tmp_path):
    with pytest.raises(UserError, match=r"no such checkpoint; give the file or the folder that holds checkpoint-last.pth"):
        checkpoint.load(checkpoint.locate(tmp_path))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="no dict 'model'"):
        checkpoint.load(tmp_path / "list.pth")
    torch.save({"model": {"w": 3}}, tmp_path / "number.pth")
    with pytest.raises(UserError, match="no dict 'model' of tensors"):
        checkpoint.load(tmp_path / "number.pth")


def test_the_published_client_line_loads_what_we_write(tmp_path):
    checkpoint.save(tmp_path / checkpoint.NAME, content())
    tiny_model().load_state_dict(torch.load(tmp_path / checkpoint.NAME)["model"])


def test_weights_of_another_model_are_described_and_nothing_is_loaded(tmp_path):
    model = tiny_model("mar")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        UserError, match=r"x.pth: weights of another model: 3\d missing \(.*mask_token.*\); \d+ unknown"
    ) as error:
        checkpoint.load_weights(model, tiny_model("ar").state_dict(), tmp_path / "x.pth")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"of another shape \(class_emb.weight \(7, 32\) instead of \(4, 32\)\)"):
        checkpoint.load_weights(model, tiny_model("mar", class_num=7).state_dict(), tmp_path / "x.pth")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_random_state_of_every_generator_comes_back(tmp_path):
    device = torch.device("cpu")
    draw = lambda: (random.random(), np.random.random(), torch.rand(1).item())  # noqa: E731
    torch.save({"model": {}, "random": checkpoint.random_state(device)}, tmp_path / "state.pth")
    first = draw()
    checkpoint.set_random_state(checkpoint.load(tmp_path / "state.pth")["random"], device)
    assert draw() == first
