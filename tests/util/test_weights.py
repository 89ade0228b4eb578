import json
import struct

import pytest
import torch

from conftest import tiny_model
from util import checkpoint
from util.errors import UserError


def written(path, header: bytes, length: int | None = None, data: bytes = b"\0" * 8):
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def one_tensor(dtype: str = "F32", shape=(2,), offsets=(0, 8)) -> bytes:
    return json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


def test_round_trip_leaves_the_file_its_hash_and_every_bit(tmp_path):
    before = tiny_model().state_dict()
    checkpoint.save_safetensors(tmp_path / checkpoint.SAFETENSORS_NAME, before)
    after = checkpoint.load_safetensors(tmp_path / checkpoint.SAFETENSORS_NAME)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        checkpoint.SAFETENSORS_NAME,
        f"{checkpoint.SAFETENSORS_NAME}.sha256",
    ]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / checkpoint.SAFETENSORS_NAME
    checkpoint.save_safetensors(path, {"w": torch.ones(2)})
    shared = torch.zeros(2)
    with pytest.raises(RuntimeError, match="share memory"):
        checkpoint.save_safetensors(path, {"a": shared, "b": shared})
    assert checkpoint.load_safetensors(path)["w"].tolist() == [1, 1]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        checkpoint.SAFETENSORS_NAME,
        f"{checkpoint.SAFETENSORS_NAME}.sha256",
    ]


def test_the_file_may_be_read_by_whom_the_umask_lets(tmp_path):
    checkpoint.save_safetensors(tmp_path / checkpoint.SAFETENSORS_NAME, {"w": torch.ones(2)})
    (tmp_path / "other").touch()
    assert (tmp_path / checkpoint.SAFETENSORS_NAME).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / checkpoint.SAFETENSORS_NAME
    checkpoint.save_safetensors(path, tiny_model().state_dict())
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    for load in (checkpoint.load_safetensors, checkpoint.load):
        with pytest.raises(UserError, match=r"model.safetensors: damaged, its SHA-256"):
            load(path)


def test_a_checkpoint_may_be_a_safetensors_file(tmp_path):
    model = tiny_model()
    checkpoint.save_safetensors(tmp_path / "any.safetensors", model.state_dict())
    content = checkpoint.load(tmp_path / "any.safetensors")
    assert list(content) == ["model"]
    other = tiny_model()
    torch.nn.init.zeros_(other.fake_latent)
    checkpoint.load_weights(other, content["model"], tmp_path)
    assert torch.equal(other.fake_latent, model.fake_latent)


DAMAGED = {
    "empty": lambda path: path.touch(),
    "header longer than any file": lambda path: written(path, one_tensor(), length=2**63),
    "header longer than the file": lambda path: written(path, one_tensor(), length=10_000),
    "header no JSON": lambda path: written(path, b"{not json}"),
    "header a list": lambda path: written(path, b"[1]"),
    "data outside the file": lambda path: written(path, one_tensor(offsets=(0, 2**40), shape=(2**38,))),
    "data not of its shape": lambda path: written(path, one_tensor(shape=(3,))),
    "data cut short": lambda path: written(path, one_tensor(), data=b"\0" * 7),
    "unknown type": lambda path: written(path, one_tensor("OBJECT")),
    "a pickle": lambda path: torch.save({"model": {}}, path),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_named_in_one_line(kind, tmp_path):
    path = tmp_path / checkpoint.SAFETENSORS_NAME
    DAMAGED[kind](path)
    for load in (checkpoint.load_safetensors, checkpoint.load):
        with pytest.raises(
            UserError, match=f"^{path}: cannot be read, it is damaged or no safetensors file"
        ) as error:
            load(path)
        assert str(error.value).isprintable()


def test_what_is_no_weights_is_refused(tmp_path):
    path = written(tmp_path / checkpoint.SAFETENSORS_NAME, one_tensor().replace(b'"w"', b'"\\u001b"'))
    with pytest.raises(UserError, match="no dict 'model' of tensors"):
        checkpoint.load_safetensors(path)
    with pytest.raises(UserError, match=r"absent\.safetensors: no such file"):
        checkpoint.load_safetensors(tmp_path / "absent.safetensors")
    torch.save({"model": {}, "model_ema": [1]}, tmp_path / "ema.pth")
    with pytest.raises(UserError, match=r"ema\.pth: not a checkpoint, it has no dict 'model_ema' of tensors"):
        checkpoint.load(tmp_path / "ema.pth")
