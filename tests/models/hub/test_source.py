"""What folders and files hold of a model."""

import json

import pytest
import torch

from conftest import tiny_model
from models import fractalgen
from models.fractalgen import FractalGen
from models.hub import zoo
from models.hub.presets import PRESETS
from models.hub.source import find
from util import checkpoint
from util.errors import UserError
from util.pixels import Alphabet

NAME = "fractalmar_tiny_in8"


@pytest.fixture
def run(tmp_path):
    """The folder of a run of three classes, whose averaged weights are half of the others."""
    settings = {
        "model": NAME, "class_num": 3, "class_names": ["ant", "bee", "cat"], "label_drop_prob": 0.2,
        "attn_dropout": 0.0, "proj_dropout": 0.3, "r_weight": 1.0, "batch_size": 16,
    }  # fmt: skip
    (tmp_path / "settings.json").write_text(json.dumps({"settings": settings}))
    weights = fractalgen.build(NAME, class_num=3).state_dict()
    average = {name: value / 2 for name, value in weights.items()}
    checkpoint.save(tmp_path, {"step": 7, "model": weights, "model_ema": average})
    return tmp_path


def test_a_run_is_a_model_with_averaged_weights_and_names(run):
    model = zoo.load(run, "cpu")
    weights = checkpoint.load(run / "checkpoint-last.pth")["model"]
    assert torch.equal(model.fake_latent, weights["fake_latent"] / 2)
    assert (model.class_num, model.class_names) == (3, ("ant", "bee", "cat"))
    assert (model.label_drop_prob, model.arguments["proj_dropout"]) == (0.2, 0.3)
    assert model.sampling_defaults == PRESETS[NAME].sampling_defaults
    assert not model.training


def test_a_checkpoint_of_a_run_is_a_model_too(run):
    assert FractalGen.from_pretrained(run / "checkpoint-00000007.pth").class_num == 3


def test_a_runs_model_saved_is_that_model(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = FractalGen.from_pretrained(run)
    model.save_pretrained(folder)
    again = FractalGen.from_pretrained(folder)
    assert again.config == model.config
    assert torch.equal(again.class_emb.weight, model.class_emb.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "fractalgpt"}, "damaged (unknown model fractalgpt)"),
        ({"class_names": ["ant"]}, "describes no model (class_names must be 3 names"),
        ({"class_num": 10**9}, "describes no model (it has more than the"),
    ],
)
def test_settings_of_no_model_are_named(run, change, message):
    content = json.loads((run / "settings.json").read_text())
    content["settings"].update(change)
    (run / "settings.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        FractalGen.from_pretrained(run)
    assert str(error.value).startswith(f"{run}/settings.json: {message}")


def test_a_run_on_other_data_is_its_model(run):
    content = json.loads((run / "settings.json").read_text())
    other = {"img_size_list": [[6, 4], [3, 2], 1], "channels": 1, "num_values": 5, "value_kind": "ordinal"}
    content["settings"].update(other, mean=[0.1], std=[0.2], num_conds=3, guiding_pixel=False)
    (run / "settings.json").write_text(json.dumps(content))
    weights = fractalgen.build(NAME, class_num=3, num_conds=3, **other).state_dict()
    checkpoint.save(run, {"step": 7, "model": weights})
    model = FractalGen.from_pretrained(run)
    assert (model.image_shape, model.alphabet) == ((6, 4), Alphabet(1, 5, "ordinal", [0.1], [0.2]))
    assert find(run).preset == NAME


def test_weights_alone_are_a_source_but_no_model(run):
    (run / "settings.json").unlink()
    assert find(run).config is None
    assert find(run / "checkpoint-last.pth").path == run / "checkpoint-last.pth"
    with pytest.raises(UserError, match=r"config.json: no such file; .*, and training settings.json"):
        FractalGen.from_pretrained(run)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no model; save_pretrained writes config.json and"):
        find(tmp_path)


@pytest.mark.parametrize("name", PRESETS)
def test_an_architecture_has_its_name(name, tmp_path):
    with torch.device("meta"):
        config = json.loads(json.dumps(fractalgen.build(name, class_num=2).config))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    assert find(tmp_path).preset == name


def test_another_architecture_has_none(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert find(tmp_path).preset is None
