"""Models by name."""

import json
from types import SimpleNamespace

import pytest
import torch

from conftest import tiny_model
from models import fractalgen
from models.hub import source, zoo
from models.hub.classes import imagenet_names
from util import download
from util.errors import UserError


def test_a_folder_and_a_published_name(tmp_path, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(zoo.load(tmp_path / "m", "cpu").fake_latent, model.fake_latent)

    published = fractalgen.build("fractalmar_tiny_in8")
    torch.save({"model": published.state_dict()}, tmp_path / "checkpoint-last.pth")
    monkeypatch.setitem(download.FILES, "fractalmar_tiny_in8", "nowhere")
    monkeypatch.setattr(download, "download", lambda name: tmp_path / "checkpoint-last.pth")
    loaded = zoo.load("fractalmar_tiny_in8", "cpu")
    assert torch.equal(loaded.fake_latent, published.fake_latent)
    assert not loaded.training
    assert loaded.class_names == tuple(imagenet_names())
    assert loaded.about == source.PUBLISHED


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """Two bundled models, of which only "second" is there."""
    folders = {name: tmp_path / f"{name}_model" for name in ("first", "second")}
    tiny_model().save_pretrained(folders["second"])
    monkeypatch.setattr(zoo, "BUNDLED", folders)
    return folders


def test_a_bundled_model_is_loaded_by_its_name_and_the_default_comes_first(bundled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "second").mkdir()  # a folder of data, not the model that is meant
    assert zoo.load("second", "cpu").class_num == 4
    assert zoo.names() == ["second"]
    tiny_model(class_num=7).save_pretrained(bundled["first"])
    for default in bundled:
        monkeypatch.setattr(zoo, "DEFAULT", default)
        assert (zoo.names()[0], len(zoo.names())) == (default, 2)


def test_a_bundled_model_that_is_missing_is_named_with_those_that_are_there(bundled):
    with pytest.raises(
        UserError, match=r"^first: the folder .*first_model .* missing; bundled here: second$"
    ):
        zoo.load("first", "cpu")
    with pytest.raises(UserError, match=r"^secnd: no such .*; perhaps second; bundled here: second$"):
        zoo.load("secnd", "cpu")
    (bundled["second"] / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"bundled here: none$"):
        zoo.load("second", "cpu")


@pytest.mark.parametrize("name", zoo.names())
def test_what_is_bundled_names_its_classes_and_what_it_was_trained_on(name):
    folder = zoo.BUNDLED[name]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert len(config["class_names"]) == config["class_num"]
    assert config["about"]["data"]
    assert (folder / "README.md").is_file()


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none: no such folder"):
        zoo.load(tmp_path / "none")
    with pytest.raises(UserError, match="nodevice"):
        zoo.load(tmp_path, "nodevice")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fractalmar_in63", "; perhaps fractalmar_in64, "),
        ("FractalMAR-in64", "; perhaps fractalmar_in64, "),
        ("bert", ""),
        ("./out/model", ""),
        ("out/old/model", ""),
    ],
)
def test_what_can_be_no_id_on_the_hub_is_refused_without_a_network(name, message, monkeypatch):
    monkeypatch.setattr(source, "hf_hub_download", None)
    with pytest.raises(UserError, match=f"^{name}: no such folder or published model{message}"):
        zoo.load(name, "cpu")


def test_an_id_on_the_hub_is_asked_for_there(monkeypatch):
    def no_network(name, *arguments):
        raise OSError(f"asked for {name}")

    monkeypatch.setattr(source, "hf_hub_download", no_network)
    for name in ("owner/name", "Owner-1/my.model_v2"):
        with pytest.raises(UserError, match=f"asked for {name}"):
            zoo.load(name, "cpu")


def test_without_a_gpu_or_the_weights_it_is_the_bundled_model(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "box")
    monkeypatch.setattr(zoo, "BUNDLED", {zoo.DEFAULT: tmp_path / "box"})
    monkeypatch.setattr(zoo, "find_device", lambda device=None: torch.device("cpu"))
    model, said = zoo.load_or_bundled("fractalmar_in64")
    assert model.class_num == 4
    assert f"bundled model {zoo.DEFAULT}, since: fractalmar_in64 wants a GPU" in said

    def no_network(name):
        raise UserError("no network")

    accelerator = SimpleNamespace(type="an accelerator")
    monkeypatch.setattr(
        zoo, "find_device", lambda device=None: torch.device("cpu") if device else accelerator
    )
    monkeypatch.setattr(zoo, "load", lambda name: no_network(name) if name in download.FILES else model)
    assert "no network" in zoo.load_or_bundled("fractalmar_in64")[1]
    monkeypatch.undo()
    with pytest.raises(UserError, match="no such folder"):
        zoo.load_or_bundled(tmp_path / "nothing")
