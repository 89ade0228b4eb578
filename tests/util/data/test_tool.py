import json
import resource
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from conftest import random_values, save_image
from util.data import tool as dataset_tool
from util.data.loader import open_split
from util.pixels import shape_name


@pytest.fixture
def folder(tmp_path):
    """60 training and 4 validation images in 2 classes."""
    for split, n in (("train", 60), ("val", 4)):
        for i, values in enumerate(random_values(n, 12)):
            save_image(tmp_path / "files" / split / "ab"[i % 2] / f"{i:02d}.png", values)
    return tmp_path / "files"


def tool(command: str, *words) -> int:
    return dataset_tool.main([command, *map(str, words), "--num_workers", "0"])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_check_lists_what_is_bad_and_says_so_by_its_status(folder, capsys):
    assert tool("check", folder) == 0
    assert capsys.readouterr().out.splitlines() == [
        "train: class folders, 2 classes, 60 images, 0 bad",
        "val: class folders, 2 classes, 4 images, 0 bad",
    ]
    (folder / "train" / "b" / "07.png").write_bytes(b"")
    (folder / "val" / "a" / "00.png").write_bytes(b"text")
    assert dataset_tool.main(["check", str(folder), "--num_workers", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{folder}/train/b/07.png: cannot be read as an image (not an image)")
    assert lines[1] == "train: class folders, 2 classes, 60 images, 1 bad"
    assert lines[2].startswith(f"{folder}/val/a/00.png: cannot be read")


def test_check_goes_on_with_val_where_train_is_missing(folder, capsys):
    assert tool("check", folder / "nowhere") == 1
    assert tool("check", folder, "--splits", "val") == 0
    (folder / "train").rename(folder / "elsewhere")
    capsys.readouterr()
    assert tool("check", folder) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "train: no such folder" in lines[0]
    assert lines[-1] == "val: class folders, 2 classes, 4 images, 0 bad"


def test_packing_that_was_killed_goes_on_and_ends_with_the_same_bytes(folder, tmp_path, monkeypatch):
    (folder / "train" / "a" / "02.png").write_bytes(b"bad")
    (folder / "train" / "b" / "59.png").write_bytes(b"bad")
    monkeypatch.setattr(dataset_tool, "BATCH", 1)
    assert tool("pack", folder, tmp_path / "whole", "--img_size", 8) == 0
    killed, slowly = (
        tmp_path / "killed" / "train",
        "from util.data import tool as t; import time; t.BATCH = 1; write = t.write_json",
    )
    slowly += "; t.write_json = lambda *a: (time.sleep(0.02), write(*a)); t.main()"
    command = [
        sys.executable,
        "-c",
        slowly,
        "pack",
        folder,
        tmp_path / "killed",
        "--img_size",
        "8",
        "--num_workers",
        "0",
    ]
    process = subprocess.Popen(list(map(str, command)), cwd=Path(__file__).parents[3], stderr=subprocess.PIPE)
    done, give_up = 0, time.monotonic() + 60
    while done < 5 and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.005)
        if (killed / "progress.json").exists():
            done = json.loads((killed / "progress.json").read_text())["done"]
    process.kill()
    process.wait()
    assert 5 <= done < 60, process.stderr.read().decode()
    assert not (killed / "pack.json").exists()
    assert tool("pack", folder, tmp_path / "killed", "--img_size", 8) == 0
    for split in ("train", "val"):
        assert contents(tmp_path / "killed" / split) == contents(tmp_path / "whole" / split)
    assert set(open_split(tmp_path / "killed", "train").bad) == {1, 59}


@pytest.mark.parametrize(
    ("text", "shape"), [("28", (28, 28)), ("28x20", (28, 20)), ("64x", (64,)), ("8x16x16", (8, 16, 16))]
)
def test_sizes_name_the_cells_of_each_axis(text, shape):
    assert dataset_tool.parse_shape(text) == shape
    assert shape_name(shape) == text


@pytest.mark.parametrize("text", ["0", "8x0", "x8", "8x8x8x8", "8 x 8", "-8", "8.0", "", "8xx", "٨"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ArgumentTypeError, match="must be as 28, 28x20, 64x or 8x16x16"):
        dataset_tool.parse_shape(text)


def test_a_finished_pack_is_left_as_it_is(folder, tmp_path):
    assert tool("pack", folder, tmp_path / "pack", "--img_size", 8) == 0
    images = tmp_path / "pack" / "train" / "pictures.npy"
    before = images.stat().st_mtime_ns
    assert tool("pack", folder, tmp_path / "pack", "--img_size", 8) == 0
    assert images.stat().st_mtime_ns == before


def test_a_full_disk_is_reported_and_packing_goes_on_later(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dataset_tool, "BATCH", 10)
    assert tool("pack", folder, tmp_path / "whole", "--img_size", 8) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
    try:
        with pytest.raises(SystemExit):
            tool("pack", folder, tmp_path / "pack", "--img_size", 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (
        "pack/train: cannot be written (File too large); run the same command to go on"
        in capsys.readouterr().err
    )
    assert 0 < json.loads((tmp_path / "pack" / "train" / "progress.json").read_text())["done"] < 60
    assert tool("pack", folder, tmp_path / "pack", "--img_size", 8) == 0
    assert contents(tmp_path / "pack" / "train") == contents(tmp_path / "whole" / "train")


def test_a_pack_of_other_images_is_not_written_over(folder, tmp_path, capsys):
    assert tool("pack", folder, tmp_path / "pack", "--img_size", 8) == 0
    before = contents(tmp_path / "pack" / "train")
    refused = "train: holds a pack of other images, classes or size"
    for size in (4, 8):
        if size == 8:
            (folder / "train" / "a" / "00.png").rename(folder / "train" / "b" / "00.png")
        with pytest.raises(SystemExit, match="2"):
            tool("pack", folder, tmp_path / "pack", "--img_size", size)
        assert refused in capsys.readouterr().err
    assert contents(tmp_path / "pack" / "train") == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pack", "x", "y"], "pack needs DATA OUT --img_size"),
        (["check", "x", "y"], "check takes no OUT"),
        (["check", "x", "--channels", "1"], "--channels, --num_values and --value_kind need --img_size too"),
        (
            ["pack", "x", "y", "--img_size", "8", "--num_values", "1"],
            "--num_values 1 must be from 2 to 65536",
        ),
        (["pack", "FILES", "NEW", "--img_size", "99999999"], "--img_size 99999999: 64 images need 1,788,"),
        (
            ["pack", "FILES", "/proc/x", "--img_size", "8"],
            "/proc/x: cannot be written (No such file or directory)",
        ),
        (["pack", "x", "y", "--img_size", "0"], "'0' must be as 28, 28x20, 64x or 8x16x16, each at least 1"),
        (["pack", "/nowhere", "y", "--img_size", "8"], "/nowhere: no such folder"),
        (
            ["pack", "FILES", "FILES", "--img_size", "8"],
            "files/train: holds other files (a); give another folder",
        ),
    ],
)
def test_bad_commands_are_one_line_and_status_2(words, message, folder, capsys):
    with pytest.raises(SystemExit) as stop:
        dataset_tool.main(
            [{"FILES": str(folder), "NEW": str(folder / "new")}.get(word, word) for word in words]
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.count("\n") == 1
