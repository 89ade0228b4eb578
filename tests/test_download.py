import pytest
import torch

from models import fractalgen
from util import checkpoint, download
from util.errors import UserError


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A checkpoint at the URL of every model, on this disk."""
    source = tmp_path / "served.pth"
    torch.save({"model": {"w": torch.ones(2)}}, source)
    monkeypatch.setattr(download, "URLS", dict.fromkeys(download.FILES, source.as_uri()))
    monkeypatch.chdir(tmp_path)
    return source


@pytest.mark.parametrize("name", download.FILES)
def test_each_published_function_fetches_its_model(name, served):
    assert name in fractalgen.PRESETS
    path = getattr(download, f"download_pretrained_{name}")(overwrite=False)
    assert str(path) == f"pretrained_models/{name}/checkpoint-last.pth"
    assert checkpoint.load(path)["model"]["w"].tolist() == [1, 1]


def test_weights_that_are_there_are_kept_unless_overwritten(served):
    path = download.download("fractalar_in64")
    torch.save({"model": {"w": torch.zeros(2)}}, served)
    assert checkpoint.load(download.download("fractalar_in64"))["model"]["w"][0] == 1
    assert checkpoint.load(download.download("fractalar_in64", overwrite=True))["model"]["w"][0] == 0
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint-last.pth"]


@pytest.mark.parametrize("content", [b"<html>busy</html>", None], ids=["a web page", "cut short"])
def test_what_is_no_checkpoint_never_gets_the_name(served, content):
    served.write_bytes(served.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UserError, match="what came is no checkpoint"):
        download.download("fractalar_in64")
    served.unlink()
    with pytest.raises(UserError, match=r"cannot be fetched .*; fetch it by other means as pretrained_models"):
        download.download("fractalar_in64")
    assert list((served.parent / "pretrained_models" / "fractalar_in64").iterdir()) == []


def test_a_model_without_official_weights_is_an_error():
    with pytest.raises(UserError, match="no official weights for 'x'; there are some for fractalar_in64"):
        download.download("x")
