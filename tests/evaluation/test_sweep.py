"""--sweep: which runs it makes, that they share their noise, and which it calls the best."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image

import engine_fractalgen as engine
import main_fractalgen
from conftest import random_levels, save_image
from evaluation import sweep
from util.errors import UserError

FLAGS = (
    "--model fractalar_tiny_in8 --class_num 3 --device cpu --num_workers 0 --amp off --num_images 6 --gen_bsz 6 "
    "--num_iter_list 4,16 --sweep"
)


def run(flags: str, output_dir) -> None:
    main_fractalgen.main([*shlex.split(f"{FLAGS} {flags}"), "--output_dir", str(output_dir)])


def images(folder) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def test_every_combination_once():
    assert sweep.cells(["cfg=1,2", "temperature=1,1.05"]) == [
        {"cfg": 1, "temperature": 1},
        {"cfg": 1, "temperature": 1.05},
        {"cfg": 2, "temperature": 1},
        {"cfg": 2, "temperature": 1.05},
    ]
    assert sweep.cells([]) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["steps=1,2"], "--sweep steps=1,2: give each of cfg, temperature, filter_threshold at most once"),
        (["cfg=1", "cfg=2"], "--sweep cfg=2: give each of"),
        (["cfg"], "--sweep cfg: cfg takes numbers with commas between them, as in cfg=1,1.05"),
        (["cfg=1,a"], "--sweep cfg=1,a: cfg takes numbers"),
        (["cfg=2,2.0"], "--sweep cfg=2,2.0: cfg takes finite numbers, each once"),
        (["cfg=inf"], "--sweep cfg=inf: cfg takes finite numbers"),
    ],
)
def test_what_cannot_be_swept_is_named(given, message):
    with pytest.raises(UserError) as refused:
        sweep.cells(given)
    assert str(refused.value).startswith(message)


def test_the_best_has_the_lowest_fid_or_without_reference_the_highest_is():
    rows = [
        {"fid": 3.0, "inception_score": 9.0},
        {"fid": 2.0, "inception_score": 8.0},
        {"fid": 2.5, "inception_score": 7.0},
    ]
    assert sweep.best_of(rows) == (1, "fid")
    assert sweep.best_of([{**row, "fid": None} for row in rows]) == (0, "inception_score")


def test_a_sweep_draws_each_run_from_the_same_noise_and_scores_it(tmp_path, colour_network, capsys):
    real = tmp_path / "real"
    for i, levels in enumerate(random_levels(9, 8)):
        save_image(real / f"{i}.png", levels)
    run(f"cfg=1,4 temperature=1,1.5 --fid_stats {real}", tmp_path)
    out = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [(row["cfg"], row["temperature"]) for row in result["rows"]] == [
        (1, 1),
        (1, 1.5),
        (4, 1),
        (4, 1.5),
    ]
    best = min(result["rows"], key=lambda row: row["fid"])
    assert result["best"] == sweep.name_of({name: best[name] for name in ("cfg", "temperature")})
    assert [line.split()[1] for line in out if line.startswith("* cfg")] == [result["best"]]
    assert out[-1].startswith("* best fid of 6 images each")
    assert Image.open(tmp_path / "sweep" / "sweep.png").width > 600
    first = tmp_path / "sweep" / "cfg=1,temperature=1" / "generated"
    assert json.loads((first / "metrics.json").read_text())["run"]["settings"]["temperature"] == 1

    plain = FLAGS.removesuffix("--sweep") + "--evaluate_gen --temperature 1.5"
    main_fractalgen.main([*plain.split(), "--output_dir", str(tmp_path / "alone")])
    swept = images(tmp_path / "sweep" / "cfg=1,temperature=1.5" / "generated")
    assert np.array_equal(swept, images(tmp_path / "alone" / "generated")), (
        "as a run with these settings draws them"
    )
    assert (swept != images(first)).any()


def test_a_sweep_that_was_stopped_draws_only_what_is_missing(tmp_path, colour_network, monkeypatch):
    run("cfg=1,4", tmp_path)
    before = {name: images(tmp_path / "sweep" / name / "generated") for name in ("cfg=1", "cfg=4")}
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]
    (tmp_path / "sweep" / "sweep.json").unlink()
    (tmp_path / "sweep" / "cfg=4" / "generated" / "00002.png").unlink()
    drawn, plain = [], engine.draw
    monkeypatch.setattr(engine, "draw", lambda *given: drawn.extend(given[2]) or plain(*given))
    run("cfg=1,4", tmp_path)
    assert drawn == [2]
    for name, levels in before.items():
        assert np.array_equal(images(tmp_path / "sweep" / name / "generated"), levels)
    again = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]
    assert [row["inception_score"] for row in again] == [row["inception_score"] for row in rows]
    with pytest.raises(SystemExit, match="2"):
        run("cfg=1,4 --seed 1", tmp_path)


def test_without_a_reference_it_says_what_the_choice_is_worth(tmp_path, colour_network, capsys):
    run("temperature=1,2", tmp_path)
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["by"] == "inception_score"
    assert "give --fid_stats to choose by FID" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("cfg=0.5,1", "cfg) 0.5 must be from 1"),
        ("temperature=0", "temperature 0.0 must be above 0"),
        ("cfg=1,2 --class_num 0", "--cfg 2.0 needs classes"),
        ("cfg=1,2 --num_images 5", "--num_images 5 must be a multiple of --class_num 3"),
    ],
)
def test_every_cell_is_checked_before_the_first_is_drawn(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(flags, tmp_path)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
