import argparse
import errno
import io
import os
import pickle
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import hostile
import pytest
import torch

from conftest import tiny_model
from util import checkpoint
from util.errors import UserError
from util.run.folder import clean, load_newest

ROOT = Path(__file__).parents[2]


def content(step: int = 7) -> dict:
    return {
        "model": tiny_model().state_dict(),
        "optimizer": {},
        "epoch": 3,
        "scaler": {},
        "args": argparse.Namespace(lr=1.0),
        "step": step,
    }


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_published_format_round_trip(tmp_path):
    checkpoint.save(tmp_path, content())
    loaded = checkpoint.load(tmp_path / checkpoint.NAME)
    assert list(loaded)[:5] == ["model", "optimizer", "epoch", "scaler", "args"]
    assert loaded["args"] == argparse.Namespace(lr=1.0)
    assert torch.equal(loaded["model"]["fake_latent"], content()["model"]["fake_latent"])


def test_the_last_few_are_kept_and_the_published_name_is_the_newest(tmp_path):
    for step in (7, 20, 3, 21):  # step 3 comes from a run that went back to an earlier step
        checkpoint.save(tmp_path, content(step), keep_last=2)
    assert names(tmp_path) == [
        "checkpoint-00000003.pth", "checkpoint-00000003.pth.sha256", "checkpoint-00000021.pth", "checkpoint-00000021.pth.sha256",
        "checkpoint-last.pth",
    ]  # fmt: skip
    assert (tmp_path / checkpoint.NAME).samefile(tmp_path / "checkpoint-00000021.pth")
    subprocess.run(
        ["sha256sum", "--check", "--strict", *map(str, tmp_path.glob("*.sha256"))], cwd=tmp_path, check=True
    )


def test_only_what_we_wrote_is_cleared_away_and_never_the_newest(tmp_path):
    # The last one has a name like ours but no hash.
    foreign = ["checkpoint-40.pth", "checkpoint-00000080-best.pth", "checkpoint-00000090.pth"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    for step in (1, 2):
        checkpoint.save(tmp_path, content(step), keep_last=1)
        # A time in the future, by another machine's clock.
        os.utime(tmp_path / f"checkpoint-{step:08d}.pth", times=(2**32, 2**32))
    assert {*foreign, "checkpoint-00000002.pth", "checkpoint-last.pth"} <= set(names(tmp_path))
    assert not (tmp_path / "checkpoint-00000001.pth").exists()
    assert load_newest(tmp_path / checkpoint.NAME, pytest.fail)[1]["step"] == 2
    checkpoint.save(tmp_path, content(3), keep_last=2)
    assert load_newest(tmp_path / checkpoint.NAME, pytest.fail)[1]["step"] == 3


def test_the_best_weights_are_replaced_verified_and_never_cleared_away(tmp_path):
    for step in (1, 2):
        checkpoint.save_best(tmp_path, content(step))
    for step in (3, 4, 5):
        checkpoint.save(tmp_path, content(step), keep_last=1)
    path = tmp_path / checkpoint.BEST
    assert checkpoint.load(path)["step"] == 2
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"checkpoint-best\.pth: damaged"):
        checkpoint.load(path)


def steps(folder) -> list[int]:
    return sorted(int(path.stem[-8:]) for path in folder.glob("checkpoint-0*.pth"))


def test_the_newest_is_that_of_the_highest_step_whatever_the_clocks_say(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, content(step), keep_last=2)
        os.utime(checkpoint.numbered(tmp_path, step), times=(2**32 - step, 2**32 - step))
    assert steps(tmp_path) == [2, 3]
    (tmp_path / checkpoint.NAME).unlink()
    assert load_newest(tmp_path / checkpoint.NAME, pytest.fail)[1]["step"] == 3


def test_the_healthy_one_is_kept_and_a_run_that_went_back_removes_what_came_after(tmp_path):
    for step in (1, 2, 3, 4, 5):
        healthy = checkpoint.numbered(tmp_path, 1) if step > 1 else None
        checkpoint.save(tmp_path, content(step), keep_last=2, healthy=healthy)
    assert steps(tmp_path) == [1, 4, 5]
    assert checkpoint.find_healthy(tmp_path) == checkpoint.numbered(tmp_path, 1)
    checkpoint.make_last(checkpoint.numbered(tmp_path, 1))
    assert load_newest(tmp_path / checkpoint.NAME, pytest.fail)[1]["step"] == 1
    checkpoint.save(tmp_path, content(2), keep_last=2, healthy=checkpoint.numbered(tmp_path, 1))
    assert steps(tmp_path) == [1, 2]
    (tmp_path / checkpoint.HEALTHY).write_bytes(b"\xff../../etc/passwd\n")
    assert checkpoint.find_healthy(tmp_path) is None


@pytest.mark.parametrize("healthy", [None, 1])
def test_on_a_full_disk_the_older_checkpoint_makes_room(tmp_path, monkeypatch, healthy):
    """The disk has room for two and a half."""
    checkpoint.save(tmp_path, content(1))
    size, write = (tmp_path / checkpoint.NAME).stat().st_size, checkpoint.HashingFile.write

    def refuse(self, data):
        self.file.flush()
        files = {path.stat().st_ino: path.stat().st_size for path in tmp_path.glob("checkpoint-*")}
        if sum(files.values()) + len(data) > 2.5 * size:
            kept = checkpoint.load(checkpoint.numbered(tmp_path, healthy or steps(tmp_path)[-1]))
            assert checkpoint.load(tmp_path / checkpoint.NAME)["step"] >= kept["step"], "one is always whole"
            self.error = OSError(errno.ENOSPC, "No space left on device")
            raise self.error
        return write(self, data)

    monkeypatch.setattr(checkpoint.HashingFile, "write", refuse)
    known = checkpoint.numbered(tmp_path, healthy) if healthy else None
    for step in (2, 3, 4):
        checkpoint.save(tmp_path, content(step), healthy=known)
    assert steps(tmp_path) == [healthy or 3, 4]
    assert checkpoint.load(tmp_path / checkpoint.NAME)["step"] == 4
    size = 0  # no room at all
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, content(5), healthy=known)
    assert steps(tmp_path) == [healthy or 4]
    assert checkpoint.load(tmp_path / checkpoint.NAME)["step"] == (healthy or 4)


def test_a_file_system_without_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(PermissionError))
    checkpoint.save(tmp_path, content(1))
    assert load_newest(tmp_path / checkpoint.NAME, pytest.fail)[1]["step"] == 1
    monkeypatch.setattr(
        "shutil.copyfile", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    for step in (2, 3, 4):
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(tmp_path, content(step))
    assert len(list(tmp_path.glob("checkpoint-0*.pth"))) == 2
    assert load_newest(tmp_path / checkpoint.NAME, pytest.fail)[1]["step"] == 4


def test_killed_before_the_first_checkpoint_is_linked(tmp_path):
    checkpoint.save(tmp_path, content(1))
    (tmp_path / checkpoint.NAME).unlink()
    assert load_newest(tmp_path / checkpoint.NAME, pytest.fail)[1]["step"] == 1


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    checkpoint.save(tmp_path, content())
    before = names(tmp_path)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoint.save(tmp_path, {"step": 8, "model": lambda: None})
    assert checkpoint.load(tmp_path / checkpoint.NAME)["step"] == 7
    assert names(tmp_path) == before


def test_a_full_disk_is_the_systems_error_and_leaves_the_old_file(tmp_path):
    """The kernel's limit on the size of files stands in for a full disk."""
    script = (
        "import resource, sys; from pathlib import Path; import torch; from util import checkpoint\n"
        "small, large = ({'step': n, 'model': {'w': torch.zeros(n * 1000)}} for n in (1, 900))\n"
        "folder = Path(sys.argv[1]); checkpoint.save(folder, small)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
        "try: checkpoint.save(folder, large)\n"
        "except OSError as error: print(error.strerror, checkpoint.load(folder / checkpoint.NAME)['step'], len(list(folder.iterdir())))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert result.stdout == "File too large 1 3\n", result.stderr


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    checkpoint.save(tmp_path, content())
    whole, rng = (tmp_path / checkpoint.NAME).read_bytes(), random.Random(0)
    path = tmp_path / "checkpoint-00000007.pth"
    loaded = 0
    for trial in range(1000):
        damaged = bytearray(whole)
        if trial % 2:
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(whole)) :]
        path.write_bytes(damaged)
        if trial < 40:  # torch alone loads some damaged files without an error
            with suppress(Exception):
                torch.load(io.BytesIO(damaged), weights_only=True)
                loaded += 1
        for name in (path, tmp_path / checkpoint.NAME):
            with pytest.raises(UserError, match=f"{name}: damaged, its SHA-256"):
                checkpoint.load(name)
    assert loaded > 5, "nothing would have been wrong without the hash"


def test_if_the_newest_file_is_damaged_the_one_before_is_loaded_and_both_are_named(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, content(step), keep_last=3)
    newest = tmp_path / "checkpoint-00000003.pth"
    newest.write_bytes(newest.read_bytes()[:-1])
    said = []
    path, loaded = load_newest(tmp_path / checkpoint.NAME, said.append)
    assert (path.name, loaded["step"]) == ("checkpoint-00000002.pth", 2)
    assert [line.split(": damaged")[0] for line in said] == [str(tmp_path / checkpoint.NAME)]
    path.write_bytes(b"")
    (tmp_path / "checkpoint-00000001.pth").unlink()
    with pytest.raises(UserError, match=r"checkpoint-last.pth: damaged"):
        load_newest(tmp_path / checkpoint.NAME, said.append)
    with pytest.raises(
        UserError, match=r"checkpoint-00000003.pth: damaged"
    ):  # a file that was asked for by its name is not replaced by another
        load_newest(newest, said.append)


def test_what_a_killed_run_left_is_tidied_up(tmp_path):
    checkpoint.save(tmp_path, content())
    before = names(tmp_path)
    for name in ("checkpoint-00000009.pth.123.tmp", "checkpoint-00000009.pth.sha256", "settings.json.5.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / "mine.tmp").touch()
    clean(tmp_path)
    assert names(tmp_path) == sorted([*before, "mine.tmp"])


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
    torch.save(content(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        UserError, match=f"{checkpoint.NAME}: (cannot be read|refused), it is damaged"
    ) as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


def test_missing_file_and_file_without_weights(tmp_path):
    with pytest.raises(
        UserError, match=r"no such checkpoint; give the file or the folder that holds checkpoint-last.pth"
    ):
        checkpoint.load(checkpoint.locate(tmp_path))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="no dict 'model'"):
        checkpoint.load(tmp_path / "list.pth")
    torch.save({"model": {"w": 3}}, tmp_path / "number.pth")
    with pytest.raises(UserError, match="no dict 'model' of tensors"):
        checkpoint.load(tmp_path / "number.pth")


def test_the_published_client_line_loads_what_we_write(tmp_path):
    checkpoint.save(tmp_path, content())
    tiny_model().load_state_dict(torch.load(tmp_path / checkpoint.NAME)["model"])


def test_weights_of_another_model_are_described_and_nothing_is_loaded(tmp_path):
    model = tiny_model("mar")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        UserError, match=r"x.pth: weights of another model: 3\d missing \(.*mask_token.*\); \d+ unknown"
    ) as error:
        checkpoint.load_weights(model, tiny_model("ar").state_dict(), tmp_path / "x.pth")
    assert "\n" not in str(error.value)
    with pytest.raises(
        UserError, match=r"of another shape \(class_emb.weight \(7, 32\) instead of \(4, 32\)\)"
    ):
        checkpoint.load_weights(model, tiny_model("mar", class_num=7).state_dict(), tmp_path / "x.pth")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "what"), [("compressed", "a compressed member, "), ("overlapping", "odd members")]
)
def test_archives_that_would_fill_the_memory_are_refused(kind, what, tmp_path):
    hostile.ODD[f"{kind} members"](tmp_path / "a.pth", tmp_path)
    with pytest.raises(UserError, match=rf"a.pth: refused, it has {what}.*which torch.save never writes"):
        checkpoint.load(tmp_path / "a.pth")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.bool, torch.int64])
def test_weights_that_are_no_floats_are_refused_by_name(dtype, tmp_path):
    model = tiny_model()
    weights = {**model.state_dict(), "fake_latent": model.fake_latent.detach().to(dtype)}
    with pytest.raises(
        UserError, match=f"weight fake_latent is {dtype}; weights are floats of 16, 32 or 64 bits"
    ):
        checkpoint.load_weights(model, weights, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_in_other_floats_are_taken(dtype, tmp_path):
    model, other = tiny_model("ar"), tiny_model("ar").to(dtype)
    checkpoint.save(tmp_path, {**content(), "model": other.state_dict()})
    checkpoint.load_model(model, tmp_path, ema=False)
    assert torch.equal(model.fake_latent, other.fake_latent.float())


def test_the_last_checkpoint_is_never_one_that_goes(tmp_path, monkeypatch):
    """If it is in parts, their folder goes with it."""
    gone, remove = [], checkpoint.remove

    def watched(file):
        assert not file.samefile(tmp_path / checkpoint.NAME)
        gone.append(file.name)
        remove(file)

    monkeypatch.setattr(checkpoint, "remove", watched)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, content(step), keep_last=1)
    assert gone == ["checkpoint-00000001.pth", "checkpoint-00000002.pth"]
