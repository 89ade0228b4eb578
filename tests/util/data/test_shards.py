import errno
import json
import os
import pickle
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import torch

from conftest import random_values, save_image, train_tiny
from util import checkpoint
from util.data import shards, tool
from util.data.loader import ImageDataset, make_loader, open_split
from util.dist import World
from util.errors import UserError
from util.files import sha256
from util.pixels import RGB

ROOT = Path(__file__).parents[3]
GB = 7 * 192 / 1e9  # 7 images of 8 px: 60 images lie in 8 shards of 7 and one of 4


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FRACTALGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "PAUSES", (0.01, 0.01))
    return tmp_path / "cache"


@pytest.fixture
def files(tmp_path):
    """60 training and 12 validation images of 12 px in 3 classes. Training image 8 is bad."""
    for split, n in (("train", 60), ("val", 12)):
        for i, values in enumerate(random_values(n, 12, seed=n)):
            save_image(tmp_path / "files" / split / "abc"[i % 3] / f"{i:02d}.png", values)
    (tmp_path / "files/train/a/24.png").write_bytes(b"bad")
    return tmp_path / "files"


@pytest.fixture
def pack(files, tmp_path):
    return packed(files, tmp_path / "pack")


@pytest.fixture
def memory(pack):
    """The address of the pack in the memory of this process."""
    system = fsspec.filesystem("memory")
    system.put(str(pack), "/packs/p", recursive=True)
    yield "memory://packs/p"
    system.rm("/packs", recursive=True)


def packed(data, out, *flags, shard_gb=GB) -> Path:
    words = ["pack", data, out, "--img_size", 8, "--num_workers", 0, "--shard_gb", f"{shard_gb:.12f}", *flags]
    assert tool.main(list(map(str, words))) == 0
    return out


def read(root, workers=0, epoch=0, start=0, training=True):
    """The labels and numbers of a shuffled epoch, the sum of each image, and the errors."""
    data = ImageDataset(open_split(root, "train"), (8, 8), RGB, seed=0, flip=True, training=training)
    loader = make_loader(data, 4, World(), shuffled=True, num_workers=workers, pin_memory=False)
    loader.batch_sampler.epoch, loader.batch_sampler.start = epoch, start
    found = [(values.flatten(1).sum(1), labels, numbers) for values, labels, numbers in loader]
    return [torch.cat(one).tolist() for one in zip(*found, strict=True)], loader.bad


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_pack_in_shards_holds_the_same_images_as_one_file(files, pack, tmp_path):
    assert (
        tool.main(["pack", str(files), str(tmp_path / "one"), "--img_size", "8", "--num_workers", "0"]) == 0
    )
    folder = pack / "train"
    assert sorted(path.name for path in folder.glob("pictures*")) == [
        f"pictures-{k:05d}.npy" for k in range(9)
    ]
    shards_, one = (open_split(root, "train") for root in (pack, tmp_path / "one"))
    assert (shards_.labels == one.labels).all()
    assert (shards_.classes, shards_.bad, shards_.kind) == (one.classes, one.bad, one.kind)
    rows = np.concatenate([np.load(path) for path in sorted(folder.glob("pictures*"))])
    assert (rows == np.load(tmp_path / "one/train/pictures.npy")).all()
    for i in (0, 6, 7, 13, 55, 56, 59):
        assert torch.equal(shards_.cells(i, (8, 8), RGB), one.cells(i, (8, 8), RGB))
        assert shards_.name(i) == one.name(i)
    assert read(pack) == read(tmp_path / "one") == read(files)
    done = subprocess.run(
        ["sha256sum", "--check", "pack.sha256"], cwd=folder, capture_output=True, check=False
    )
    assert done.returncode == 0
    assert len(pickle.dumps(shards_)) < 300, "a worker opens the pack itself"


def test_packing_that_was_killed_goes_on_and_ends_with_the_same_bytes(files, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "BATCH", 5)  # batches straddle shards
    whole, write = packed(files, tmp_path / "whole"), tool.write_rows
    for stop in (0, 3, 9):

        def killed(path, row, rows, left=iter(range(stop))):  # noqa: B008
            if next(left, None) is None:
                raise KeyboardInterrupt
            write(path, row, rows)

        monkeypatch.setattr(tool, "write_rows", killed)
        with pytest.raises(SystemExit):
            packed(files, tmp_path / "killed")
        with pytest.raises(UserError, match="packing was interrupted"):
            open_split(tmp_path / "killed", "train")
    monkeypatch.setattr(tool, "write_rows", write)
    packed(files, tmp_path / "killed")
    for split in ("train", "val"):
        contents = [
            {p.name: p.read_bytes() for p in (root / split).iterdir()}
            for root in (whole, tmp_path / "killed")
        ]
        assert contents[0] == contents[1]
        assert not [name for name in contents[0] if "progress" in name or name.endswith(".tmp")]


def test_another_shard_size_is_another_pack(files, pack, capsys):
    for words in (["--shard_gb", "1"], []):
        with pytest.raises(SystemExit):
            tool.main(["pack", str(files), str(pack), "--img_size", "8", "--num_workers", "0", *words])
        assert "holds a pack of other images, classes or size" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_a_shard_size_that_is_none_is_refused(size, capsys):
    with pytest.raises(SystemExit):
        tool.main(["pack", "x", "y", "--img_size", "8", f"--shard_gb={size}"])
    assert "must be more than 0" in capsys.readouterr().err


def test_training_resumes_to_the_bit_with_any_number_of_workers(files, pack, memory, tmp_path):
    whole = read(files)
    for root in (pack, memory):
        for workers in (0, 2):
            assert read(root, workers)[0] == whole[0]
            assert [part[20:] for part in whole[0]] == read(root, workers, start=20)[0]


@pytest.mark.parametrize("kind", ["missing", "damaged", "short", "empty"])
def test_a_lost_shard_stands_out_like_a_bad_image(kind, pack, capsys):
    path = pack / "train/pictures-00003.npy"
    expected, _ = read(pack)
    time.sleep(0.01)  # a file that is changed within a tick of the clock has the time of the checked one
    if kind == "damaged":
        flip_bit(path)
    elif kind == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -100 if kind == "short" else 0])
    found, bad = read(pack)
    assert bad.keys() == {8, 21}
    reason = "No such file" if kind == "missing" else "damaged: the SHA-256 of its"
    assert bad[21].startswith(f"{path}: cannot be read ({reason}")
    assert bad[21].endswith("; with it images 21 to 27")
    instead = [number + 7 if 21 <= number < 28 else number for number in expected[2]]
    assert found[2] == instead, "an image of the next shard takes its place, another one for each"
    for workers in (1, 2):
        assert read(pack, workers) == (found, bad)
    assert tool.main(["check", str(pack), "--splits", "train", "--num_workers", "0"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [bad[21], "train: packed images of 8 px, 3 classes, 60 images, 2 bad"]
    with pytest.raises(UserError, match=r"pictures-00003.npy: cannot be read .*with it images 21 to 27"):
        read(pack, training=False)  # an evaluation would leave out many images
    with pytest.raises(UserError, match=r"pictures-00003.npy: cannot be read"):
        tool.pack(open_split(pack, "train"), pack / "again", (8, 8), RGB, 0)


def test_a_file_that_failed_after_it_was_opened_is_opened_anew_when_it_is_tried_again(pack, monkeypatch):
    source = open_split(pack, "train")
    expected = source.cells(0, (8, 8), RGB)
    shards_ = source.images
    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "preadv", lambda *_: 0)
        with pytest.raises(UserError, match="too short"):
            source.cells(0, (8, 8), RGB)
    assert not shards_.opened
    shards_.lost.clear()  # ten minutes later
    assert torch.equal(source.cells(0, (8, 8), RGB), expected)


def test_a_pack_of_less_than_a_shard_is_looked_at_and_read(files, tmp_path):
    words = ["pack", str(files), str(tmp_path), "--img_size", "8", "--num_workers", "0", "--shard_gb", "1"]
    assert tool.main(words) == 0
    source = open_split(tmp_path, "train")
    assert source.first_look == len(source) == 60


def test_strict_data_stops_at_a_lost_shard(pack, tmp_path, capsys):
    (pack / "val/pictures-00001.npy").unlink()
    with pytest.raises(SystemExit):
        train_tiny(pack, tmp_path / "out", "--strict_data")
    error = capsys.readouterr().err
    assert "--strict_data: 1 bad image(s) in " in error
    assert error.count("\n") == 1


def test_without_any_shard_a_run_ends_in_one_line(pack):
    for path in (pack / "train").glob("pictures*"):
        path.unlink()
    with pytest.raises(
        UserError, match=r"pictures-0000\d.npy: cannot be read .* images after it are bad too"
    ):
        read(pack)


def test_training_from_shards_at_an_address_equals_training_from_the_files(files, memory, tmp_path):
    ends = []
    for data in (files, memory):
        out = tmp_path / f"out{len(ends)}"
        log = train_tiny(data, out, "--eval_freq 9")
        ends.append(checkpoint.load(out / "checkpoint-last.pth")["model"])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert any(memory in record.get("note", "") for record in log)


def test_a_shard_is_read_for_its_hash_once_on_a_machine(pack, cache, monkeypatch):
    seen = []
    monkeypatch.setattr(shards, "sha256", lambda path: seen.append(path.name) or sha256(path))
    for _ in range(2):
        read(pack)
        assert sorted(seen) == ["labels.npy", *(f"pictures-{k:05d}.npy" for k in range(9))]
    os.utime(pack / "train/pictures-00002.npy")
    read(pack)
    assert seen[10:] == ["pictures-00002.npy"]


def test_the_cache_stays_within_its_bound_and_reading_goes_on(memory, cache, monkeypatch, caplog):
    whole = read(memory)
    shard = max(path.stat().st_size for path in cache.glob("?" * 64))
    for path in cache.iterdir():
        path.unlink()
    monkeypatch.setenv("FRACTALGEN_CACHE_GB", f"{3 * shard / 1e9:.9f}")
    largest, fetch = [], shards.make_room

    def watched(folder, limit, missing, killed):
        fetch(folder, limit, missing, killed)
        largest.append(sum(path.stat().st_size for path in cache.glob("?" * 64)))

    monkeypatch.setattr(shards, "make_room", watched)
    assert read(memory) == whole
    assert max(largest) <= 2 * shard
    assert len(largest) > 20, "shards are fetched again and again"
    assert "do not fit into FRACTALGEN_CACHE_GB" in caplog.text


def test_what_a_process_reads_is_not_taken_away_from_it(memory, cache):
    source = open_split(memory, "train")
    file = source.files.open("pictures-00000.npy", 7 * 192)
    shards.make_room(cache, 0, 0, ())
    assert not list(cache.glob("?" * 64))
    assert (
        os.pread(file, 7 * 192, 128)
        == fsspec.filesystem("memory").cat("/packs/p/train/pictures-00000.npy")[128:]
    )
    os.close(file)
    assert source.cells(0, (8, 8), RGB).shape == (3, 8, 8)  # is fetched again
    assert (source.labels == open_split(memory, "train").labels).all()


def test_killed_downloads_are_removed_and_no_others(memory, cache):
    source = open_split(memory, "train")
    digest, other = source.files.hashes["pictures-00000.npy"], source.files.hashes["pictures-00001.npy"]
    for name in (f"{digest}.123.tmp", f"{other}.124.tmp"):
        (cache / name).write_bytes(b"half")
    source.cells(0, (8, 8), RGB)
    assert [path.name for path in cache.glob("*.tmp")] == [f"{other}.124.tmp"]


FETCH = """
import sys, time, fsspec
from fsspec.implementations.local import LocalFileSystem
from util.data.loader import open_split
from util.pixels import RGB
get = LocalFileSystem.get_file
def slowly(self, source, target, **more):
    print(source.split("/")[-1], flush=True)
    time.sleep(0.3)
    get(self, source, target, **more)
LocalFileSystem.get_file = slowly
source = open_split(sys.argv[1], "train")
total = sum(int(source.cells(i, (8, 8), RGB).sum()) for i in (0, 6, 13))
print("sum", total)
"""


def test_two_processes_fetch_a_shard_once(pack):
    command = [sys.executable, "-c", FETCH, f"file://{pack}"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = [process.communicate(timeout=100)[0].splitlines() for process in both]
    assert sorted(lines[0][:-1] + lines[1][:-1]) == ["labels.npy", "pictures-00000.npy", "pictures-00001.npy"]
    assert lines[0][-1] == lines[1][-1]


class Broken(Exception):
    """The error of a file system that does not use Python's."""


@pytest.mark.parametrize("failures", [2, 3])
def test_a_transfer_that_breaks_is_tried_again(failures, memory, monkeypatch):
    source, system = open_split(memory, "train"), fsspec.filesystem("memory")
    tries, get = [], type(system).get_file

    def broken(self, path, target, **more):
        tries.append(path)
        if len(tries) == 1:
            Path(target).write_bytes(b"half")  # ends early, without an error
        elif len(tries) <= failures:
            raise Broken("GET https://me:word@host/x?sig=SECRET: 503")
        else:
            get(self, path, target, **more)

    monkeypatch.setattr(type(system), "get_file", broken)
    if failures == 2:
        source.cells(0, (8, 8), RGB)
        assert len(tries) == 3
        return
    with pytest.raises(UserError) as error:
        source.cells(0, (8, 8), RGB)
    assert str(error.value) == (
        f"{memory}/train/pictures-00000.npy: cannot be fetched (GET https://host/x 503); with it images 0 to 6"
    )
    assert len(tries) == 3
    with pytest.raises(UserError):
        source.cells(1, (8, 8), RGB)
    assert len(tries) == 3, "a lost shard is not asked for again at once"
    with pytest.raises(UserError, match="GET https://host/x 503"):  # what has waited for the first one
        open_split(memory, "train").cells(1, (8, 8), RGB)
    assert len(tries) == 3, "nor by another process"
    monkeypatch.setattr(shards, "LOST", 0)
    monkeypatch.setattr(shards, "MINUTE", 0)
    source.cells(1, (8, 8), RGB)


def test_a_full_disk_of_the_cache_ends_the_run_at_once(memory, monkeypatch):
    tries = []

    def full(*_, **__):
        tries.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    open_split(memory, "train")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "get_file", full)
    with pytest.raises(UserError, match=r"FRACTALGEN_CACHE /.*: No space left on device$") as error:
        read(memory)
    assert type(error.value) is UserError  # a worker process says the type of others before the message
    assert tries == [1]


def test_shards_make_room_where_others_fill_the_disk(memory, cache, monkeypatch):
    source = open_split(memory, "train")
    source.cells(0, (8, 8), RGB)
    held = {path.name for path in cache.glob("?" * 64)}
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    source.cells(7, (8, 8), RGB)
    assert not held & {path.name for path in cache.glob("?" * 64)}


def test_a_lost_shard_keeps_none_of_the_batches_that_meet_it(pack):
    (pack / "train/pictures-00003.npy").unlink()
    data = ImageDataset(open_split(pack, "train"), (8, 8), RGB, seed=0, training=True)
    for _ in range(2):
        batch, bad = data.__getitems__([(0, 0), (0, 21)])
        image = weakref.ref(batch[0][0])
        del batch
        assert (list(bad), image()) == ([21], None)


def test_a_lost_network_is_waited_for_once(memory, monkeypatch):
    source, tries, slept = open_split(memory, "train"), [], []
    monkeypatch.setattr(shards.time, "sleep", slept.append)
    monkeypatch.setattr(
        type(fsspec.filesystem("memory")), "get_file", lambda *a, **b: tries.append(a) or 1 / 0
    )
    for i in range(60):
        if i != 8:
            with pytest.raises(UserError, match=r"cannot be fetched \(division by zero\)"):
                source.cells(i, (8, 8), RGB)
    assert (len(tries), slept) == (3 + 8 * 2, [0.01, 0.01] + 8 * [0.01])


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://nowhere", "memory://nowhere/train: pack.json: cannot be fetched (no such file)"),
        ("nosuch://x/y", "nosuch://x/y/train: pack.json: cannot be fetched (Protocol not known: nosuch)"),
        (
            "s3://me:WORD@host/pack",
            "an address of data must hold no password and no '?'; give keys by the environment",
        ),
        ("s3://me:W/ORD@host/pack", "an address of data must hold no password and no '?'"),
        ("https://WORD@host/pack", "an address of data must hold no password and no '?'"),
        ("https://host/pack?token=WORD", "an address of data must hold no password and no '?'"),
        ("memory://one", "memory://one/train: a pack at an address must be in shards; pack with --shard_gb"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_line_without_secrets(
    address, message, files, tmp_path, capsys
):
    assert (
        tool.main(["pack", str(files), str(tmp_path / "one"), "--img_size", "8", "--num_workers", "0"]) == 0
    )
    system = fsspec.filesystem("memory")
    system.put(str(tmp_path / "one"), "/one", recursive=True)
    with pytest.raises(SystemExit):
        train_tiny(address, tmp_path / "out")
    system.rm("/one", recursive=True)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "WORD" not in error


def test_an_address_may_name_an_account():
    for address in ("abfs://container@account.dfs.core.windows.net/pack", "ssh://me@host/pack"):
        assert shards.location(f"{address}/") == address


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "FRACTALGEN_CACHE",
            "/proc/x",
            "FRACTALGEN_CACHE /proc/x: cannot be written (No such file or directory)",
        ),
        (
            "FRACTALGEN_CACHE_GB",
            "many",
            "FRACTALGEN_CACHE_GB: must be a number (could not convert string to float",
        ),
        ("FRACTALGEN_CACHE_GB", "nan", "FRACTALGEN_CACHE_GB: must be a number from 0 on"),
    ],
)
def test_a_cache_that_cannot_be_used_is_said(name, value, message, pack, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        open_split(pack, "train")
    assert message in str(error.value)


def spoil_manifest(folder: Path) -> None:
    note = json.loads((folder / "pack.json").read_text())
    (folder / "pack.json").write_text(json.dumps({**note, "pictures": 10**9}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "pack.sha256").unlink(),
            "pack.sha256: cannot be read (No such file or directory)",
        ),
        (lambda folder: (folder / "pack.sha256").write_text("x"), "labels.npy: has no line in pack.sha256"),
        (lambda folder: flip_bit(folder / "labels.npy"), "labels.npy: cannot be read (damaged: the SHA-256"),
        (spoil_manifest, "labels.npy: cannot be read"),
    ],
)
def test_a_damaged_index_is_refused(damage, message, pack):
    damage(pack / "train")
    with pytest.raises(UserError) as error:
        open_split(pack, "train")
    assert message in str(error.value)
    assert str(error.value).startswith(f"{pack}/train: ")


def test_open_files_are_few(pack, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN", 2)
    before = len(list(Path("/proc/self/fd").iterdir()))
    source = open_split(pack, "train")
    for i in (*range(0, 60, 7), *range(0, 60, 7)):
        source.cells(i, (8, 8), RGB)
    assert len(source.images.opened) == 2
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3
