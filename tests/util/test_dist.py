"""Two gloo processes, started by torchrun or by their flags, give the results of one process."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Started

import main_fractalgen
from conftest import random_values
from util.dist import World, explaining_silence, from_environment
from util.errors import UserError

MODEL = "--model fractalar_tiny_in8 --class_num 2 --device cpu --num_workers 0 --amp off --proj_dropout 0 --label_drop_prob 0"


def torchrun(flags: str) -> None:
    """Starts torchrun on the command line, as a person does, and waits for its end."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        main_fractalgen.__file__,
    ]
    result = subprocess.run(
        [*command, *flags.split()], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]


def launch(processes: int, flags: str) -> None:
    """Runs main_fractalgen.py with these flags in `processes` forked processes."""
    started = Started(flags.split(), processes)
    said, _ = started.communicate()
    assert started.returncode == 0, said[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training with 1 process x batch 8 and 2 processes x batch 4, then images of the first model."""
    folder = tmp_path_factory.mktemp("dist")
    for split, n in (("train", 40), ("val", 7)):
        for i, values in enumerate(random_values(n, 8)):
            path = folder / "data" / split / str(i % 2) / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.permute(1, 2, 0).numpy()).save(path)
        (folder / "data" / split / "0" / "bad.png").write_bytes(b"no image")
    common = f"{MODEL} --data_path {folder}/data --epochs 3 --warmup_epochs 0 --lr 3e-3 --eval_freq 3 --num_iter_list 4,16"
    launch(1, f"{common} --batch_size 8 --output_dir {folder}/one")
    torchrun(f"{common} --batch_size 4 --output_dir {folder}/two")
    generate = f"{MODEL} --resume {folder}/one --evaluate_gen --num_images 6 --num_iter_list 4,16 --cfg 2"
    launch(1, f"{generate} --gen_bsz 6 --output_dir {folder}/one")
    launch(2, f"{generate} --gen_bsz 2 --output_dir {folder}/two")
    return folder


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_two_processes_follow_the_loss_of_one(runs):
    one, two = ([r for r in log(runs / name) if "train/loss" in r] for name in ("one", "two"))
    assert [r["step"] for r in one] == [r["step"] for r in two] == [5, 10, 15]
    for a, b in zip(one, two, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-3)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=2e-2)


def test_two_processes_measure_each_validation_image_once(runs):
    one, two = (log(runs / name)[-1] for name in ("one", "two"))
    assert one["val/num_images"] == two["val/num_images"] == 7
    assert one["val/bits_per_dim"] == pytest.approx(two["val/bits_per_dim"], rel=1e-3)


def test_two_processes_give_the_likelihood_of_one_whatever_the_batch(runs):
    """Uses the same weights. With batches of 2 in two processes, the last batch of 7 images has one image."""
    common = f"{MODEL} --data_path {runs}/data --resume {runs}/one --evaluate_nll"
    launch(2, f"{common} --nll_bsz 2 --output_dir {runs}/nll2")
    main_fractalgen.main(f"{common} --nll_bsz 5 --output_dir {runs}/nll1".split())
    one, two = (json.loads((runs / name / "nll.json").read_text()) for name in ("nll1", "nll2"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["num_images"] == two["num_images"] == 7
    for name in ("bits_per_dim", "standard_error", "published_nll"):
        assert one[name] == pytest.approx(two[name], rel=1e-5)  # float32
    for name in ("rgb", "level0", "level1"):
        parts = [(scores["by_channel"] | scores["by_level"])[name] for scores in (one, two)]
        assert parts[0] == pytest.approx(parts[1], rel=1e-5)


def test_a_bad_image_is_reported_once_whichever_process_met_it(runs):
    notes = [
        [r["note"] for r in log(runs / name) if "bad image" in r.get("note", "")] for name in ("one", "two")
    ]
    assert notes[0] == notes[1]
    assert [note.split(":")[0] for note in notes[0]] == ["bad image 1, skipped"] * 2
    assert [log(runs / name)[-1]["val/num_bad_images"] for name in ("one", "two")] == [1, 1]


def test_two_processes_generate_the_images_of_one(runs):
    one, two = (
        np.stack([np.asarray(Image.open(path)) for path in sorted((runs / name / "generated").glob("*.png"))])
        for name in ("one", "two")
    )
    assert one.shape == (6, 8, 8, 3)
    assert (one == two).mean() >= 0.999


def test_place_comes_from_torchrun_open_mpi_or_flags(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert from_environment() == World(0, 1, 0)
    assert from_environment(world_size=4, rank=2) == World(2, 4, 2)
    with pytest.raises(UserError, match="torchrun"):
        from_environment(world_size=4)
    with pytest.raises(UserError, match="OMPI_COMM_WORLD_RANK"):
        from_environment(on_itp=True)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert from_environment() == World(5, 8, 1)
    for name, value in (("RANK", "3"), ("SIZE", "4"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    assert from_environment(on_itp=True) == World(3, 4, 3)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv",
            "no answer from the others",
        ),
        ("Application timeout caused pair closure", "no answer from the others for 1800 s (--dist_timeout)"),
        ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer", "another process has ended"),
    ],
)
def test_what_gloo_says_of_a_lost_process_becomes_a_line_with_the_own_place(monkeypatch, error, said):
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.raises(UserError) as found, explaining_silence():
        raise RuntimeError(error)
    assert str(found.value).startswith("process 1 of 2 on ")
    assert said in str(found.value)


def test_other_errors_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="out of memory"), explaining_silence():
        raise RuntimeError("out of memory")
