"""The command that scores images, checked against torch-fidelity's own command."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import random_values, save_image
from evaluation import features, score
from util.dist import World
from util.errors import UserError

ROOT = Path(__file__).parents[2]
THEIRS = {
    "fid": "frechet_inception_distance",
    "inception_score": "inception_score_mean",
    "inception_score_std": "inception_score_std",
    "kid": "kernel_inception_distance_mean",
    "kid_std": "kernel_inception_distance_std",
    "precision": "precision",
    "recall": "recall",
}


CPU = ("--device", "cpu", "--num_workers", "0")


def run(*argv) -> None:
    score.main([*map(str, argv), *CPU])


def photographs(folder: Path, count: int, seed: int, size: int = 64) -> Path:
    """Writes crops of photographs and a few digits as images of one size. Returns the folder."""
    from skimage import data
    from sklearn.datasets import load_digits, load_sample_images

    rng = np.random.default_rng(seed)
    photos = [*load_sample_images().images, data.astronaut(), data.coffee(), data.chelsea()]
    digits = load_digits().images
    folder.mkdir()
    for i in range(count):
        if i % 4 == 3:
            grey = Image.fromarray(
                (digits[2 * rng.integers(len(digits) // 2) + seed % 2] * 15.9).astype(np.uint8)
            )
            image = grey.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        else:
            photo = photos[rng.integers(len(photos))]
            y, x = (rng.integers(side - size) for side in photo.shape[:2])
            image = Image.fromarray(photo[y : y + size, x : x + size])
        image.save(folder / f"{i:04d}.png")
    return folder


def torch_fidelity(generated: Path, real: Path, weights: Path, settings: dict, *flags: str) -> dict:
    """The scores that torch-fidelity's command prints for two folders of images."""
    command = [sys.executable, "-m", "torch_fidelity.fidelity", "--input1", generated, "--input2", real]
    command += ["--cpu", "--json", "--isc", "--fid", "--kid", "--prc", "--no-cache", "--silent"]
    command += ["--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", weights]
    command += [
        "--kid-subset-size",
        settings["kid_subset_size"],
        "--isc-splits",
        settings["isc_splits"],
        *flags,
    ]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def assert_equal_to_torch_fidelity(tmp_path, weights: Path, counts: tuple[int, int], *flags: str) -> None:
    generated = photographs(tmp_path / "a", counts[0], seed=0)
    real = photographs(tmp_path / "b", counts[1], seed=1)
    run(generated, real, "--inception_weights", weights)
    ours = json.loads((generated / "metrics.json").read_text())
    theirs = torch_fidelity(generated, real, weights, ours["score_settings"], *flags)
    for name, their_name in THEIRS.items():
        assert ours["scores"][name] == pytest.approx(theirs[their_name], rel=1e-6), name
    assert 0 < ours["scores"]["precision"] <= 1
    assert ours["scores"]["inception_score"] > 1.01, "the random network tells images apart"


def test_scores_are_those_of_torch_fidelitys_command(tmp_path, inception_weights):
    assert_equal_to_torch_fidelity(
        tmp_path, inception_weights, (9, 8), "--save-cpu-ram"
    )  # no worker processes


@pytest.mark.slow
def test_scores_of_many_photographs_are_those_of_torch_fidelitys_command(tmp_path, inception_weights):
    assert_equal_to_torch_fidelity(tmp_path, inception_weights, (320, 300))


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path, inception_weights, monkeypatch):
    folder, one, two = photographs(tmp_path / "images", 5, seed=0), tmp_path / "one.npz", tmp_path / "two.npz"
    settings = [folder, "--inception_weights", inception_weights, *CPU, "--make_reference"]
    monkeypatch.setattr(features, "BATCH", 2)  # 3 batches for 2 processes
    score.main([*map(str, settings), str(one)])
    script = tmp_path / "small.py"
    script.write_text(
        "import evaluation.features as f; f.BATCH = 2; import evaluation.score; evaluation.score.main()"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, [*torchrun, *settings, two])], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{two}: mu and sigma of 5 images, features of 5\n"
    with np.load(one) as a, np.load(two) as b:
        assert sorted(a) == ["features", "mu", "network", "sigma"]
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert one.with_suffix(".json").read_text() == two.with_suffix(".json").read_text()


@pytest.fixture
def images(tmp_path):
    for i, values in enumerate(random_values(12, 8)):
        save_image(tmp_path / "images" / f"{i:05d}.png", values)
    return tmp_path / "images"


def test_a_folder_against_a_folder_leaves_everything_in_metrics_json(
    colour_network, images, tmp_path, capsys
):
    (images / "manifest.json").write_text('{"cfg": 6.5}')
    run(images, images)
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:2] == ["FID", "↓"]
    assert table[1].startswith(str(images))
    result = json.loads((images / "metrics.json").read_text())
    assert abs(result["scores"]["fid"]) < 1e-6
    assert (result["scores"]["precision"], result["scores"]["recall"]) == (1, 1)
    assert result["generation"] == {"cfg": 6.5}
    assert result["generated"]["pictures"] == result["reference"]["pictures"] == 12
    assert result["extractor"] == colour_network.about
    assert result["score_settings"]["prc_neighborhood"] == 3
    assert result["run"]["versions"]["torch"] == torch.__version__
    assert result["run"]["commit"]
    assert list((images / "scores").glob("events.*"))
    run(images, images)  # the files of the first run do not disturb the second
    assert json.loads((images / "metrics.json").read_text())["generated"] == result["generated"]


def test_an_npz_without_a_reference_gets_an_inception_score(colour_network, tmp_path, capsys):
    np.savez(tmp_path / "samples.npz", arr_0=random_values(20, 8).permute(0, 2, 3, 1).numpy())
    run(tmp_path / "samples.npz", "--metrics", tmp_path / "out.json")
    scores = json.loads((tmp_path / "out.json").read_text())["scores"]
    assert scores["fid"] is None
    assert scores["inception_score"] > 1
    assert "FID, KID, precision and recall: not computed, there is no reference" in capsys.readouterr().out
    run(tmp_path / "samples.npz")
    assert json.loads((tmp_path / "samples.metrics.json").read_text())["scores"] == scores


BAD = {
    "no images": ("{0}/none", "none: no such folder of images or npz file"),
    "no reference": ("{0}/images {0}/none.npz", "none.npz: no such reference; for ImageNet get https://"),
    "both": ("{0}/images {0}/images --make_reference {0}/out.npz", "--make_reference takes DATA alone"),
    "name": ("{0}/images --make_reference {0}/out", "must end in .npz"),
    "split of nothing": ("{0}/images --split val", "--split val belongs to REFERENCE or --make_reference"),
    "size": ("{0}/images --img_size 0", "--img_size at least 1"),
    "device": ("{0}/images --device tpu9", "--device tpu9: torch finds no such device"),
    "manifest": ("{0}/images", "manifest.json: cannot be read as JSON"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_line_and_status_2(bad, colour_network, images, tmp_path, capsys):
    flags, message = BAD[bad]
    if bad == "manifest":
        (images / "manifest.json").write_text("{")
    with pytest.raises(SystemExit, match="2"):
        score.main(["--num_workers", "0", *flags.format(tmp_path).split()])
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert error.startswith("evaluation.score: error: ")
    assert error.count("\n") == 1


BEFORE_THE_NETWORK = {
    "reference": ("{0}/images {0}/text", "text: cannot be read as npz"),
    "images": ("{0}/text", "text: cannot be read as npz"),
    "metrics": ("{0}/images --metrics /proc/x/out.json", "/proc/x/out.json: cannot be written (No such file"),
    "metrics is a folder": ("{0}/images --metrics {0}", "cannot be written (Is a directory)"),
    "new reference": ("{0}/images --make_reference /proc/x/o.npz", "/proc/x/o.npz: cannot be written"),
}


@pytest.mark.parametrize("bad", BEFORE_THE_NETWORK)
def test_unusable_files_are_refused_before_the_network_is_loaded(bad, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(score, "Inception", None)
    (tmp_path / "text").write_text("no npz")
    flags, message = BEFORE_THE_NETWORK[bad]
    with pytest.raises(SystemExit, match="2"):
        run(*flags.format(tmp_path).split())
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_is_missing_is_said_before_the_network_is_loaded(tmp_path):
    weights = tmp_path / "no weights either"
    flags = argparse.Namespace(
        fid_stats=tmp_path / "none.npz",
        inception_weights=weights,
        img_size=8,
        num_workers=0,
        features="inception",
    )
    with pytest.raises(UserError, match=r"none\.npz: no such reference"):
        score.scorer_of_flags(flags, torch.device("cpu"), World())


def test_flags_that_name_no_reference_and_no_sweep_need_no_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = argparse.Namespace(fid_stats=None, img_size=8, sweep=None, features="inception")
    assert score.scorer_of_flags(flags, torch.device("cpu"), World()) is None
    flags.features = "efficientnet_lite0"
    with pytest.raises(
        UserError, match="--features efficientnet_lite0 needs a reference for --fid_stats; make one"
    ):
        score.scorer_of_flags(flags, torch.device("cpu"), World())
