"""The weights of the Inception network: they are found, read without running code, and checked."""

import hostile
import pytest
import torch

from conftest import random_values
from evaluation import inception
from evaluation.inception import Inception
from util import download
from util.errors import UserError
from util.files import sha256

CPU = torch.device("cpu")


def test_features_have_their_shapes_and_no_random_numbers_are_drawn(inception_weights):
    """test_score.py checks that the numbers are those of torch-fidelity."""
    before = torch.get_rng_state()
    network = Inception(inception_weights, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert network.about["weights_sha256"] == sha256(inception_weights)
    pool, logits = network(random_values(2, 64))
    assert (pool.shape, logits.shape) == ((2, 2048), (2, 1008))
    assert pool.dtype == logits.dtype == torch.float32
    assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision("high")
    try:
        torch.testing.assert_close(network(random_values(2, 64))[0], pool)
        assert torch.get_float32_matmul_precision() == "high", "the caller's setting is restored"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_damaged_and_other_weights_are_one_line(inception_weights, tmp_path):
    path = tmp_path / "weights.pth"
    refused = r"weights\.pth: refused as Inception weights .*https://github\.com/toshas/torch-fidelity/.*-6726825d\.pth"
    path.write_bytes(inception_weights.read_bytes()[:1000])
    assert_refused(path, refused)
    torch.save([torch.zeros(3)], path)
    assert_refused(path, "no dict 'Inception weights' of tensors")
    torch.save({"fc.weight": torch.zeros(3)}, path)
    assert_refused(path, "weights of another network than https")
    content = torch.load(inception_weights, weights_only=True)
    content["fc.weight"][3, 5] = torch.nan
    torch.save(content, path)
    with pytest.raises(
        UserError,
        match=r"weights\.pth: gives features that are not finite, it is damaged; get https://github",
    ):
        Inception(path, CPU)(random_values(2, 64))
    assert_refused(
        tmp_path / "none", r"--inception_weights .*/none: no such file; it is https://github\.com/toshas"
    )


@pytest.mark.parametrize("kind", {**hostile.RUNS_CODE, **hostile.ODD})
@pytest.mark.filterwarnings("ignore:.*(pickle protocol|TorchScript archive|sparse tensor|TypedStorage)")
def test_nothing_hidden_in_a_file_runs(kind, tmp_path):
    {**hostile.RUNS_CODE, **hostile.ODD}[kind](tmp_path / "weights.pth", tmp_path / "canary")
    assert_refused(tmp_path / "weights.pth", r"weights\.pth: ")
    assert not (tmp_path / "canary").exists()


def assert_refused(path, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        Inception(path, CPU)
    assert str(refused.value).isprintable()


def test_a_failed_download_is_one_line_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(download, "fetch", lambda url, part: (tmp_path / "no" / "network").read_bytes())
    with pytest.raises(
        UserError,
        match=r"^https://.*\.pth: cannot be fetched \(.*\); fetch it elsewhere and give --inception_weights",
    ):
        inception.find_weights(None)
    monkeypatch.setattr(download, "fetch", lambda url, part: part.write_text(url))
    path = inception.find_weights(None)
    assert path.read_text().endswith(path.name)
    monkeypatch.setattr(download, "fetch", None)
    assert inception.find_weights(None) == path, "the second call fetches nothing"


def test_torch_fidelity_that_is_missing_or_old_is_named(monkeypatch):
    for version in ("0.3.0", "0.3.9.post1"):
        monkeypatch.setattr(inception.metadata, "version", lambda name, version=version: version)
        with pytest.raises(
            UserError,
            match=rf"torch-fidelity 0\.4 or newer: pip install .*\[eval\].*; version {version} is here",
        ):
            inception.require_fidelity()
    monkeypatch.setattr(inception.metadata, "version", lambda name: "1.0")
    assert inception.require_fidelity() == "1.0"

    def missing(name):
        raise inception.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(inception.metadata, "version", missing)
    with pytest.raises(UserError, match="scores need torch-fidelity"):
        inception.require_fidelity()
