"""Models by name."""

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


def test_what_is_no_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "BUNDLED", tmp_path / "none")
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
    monkeypatch.setattr(zoo, "BUNDLED", tmp_path / "box")
    monkeypatch.setattr(zoo, "find_device", lambda device=None: torch.device("cpu"))
    model, said = zoo.load_or_bundled("fractalmar_in64")
    assert model.class_num == 4
    assert "bundled model, since: fractalmar_in64 wants a GPU" in said

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
