"""--sweep: its cells, the random numbers that they share, and the choice of the best."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image

import evaluation.images
import main_fractalgen
from conftest import random_values, save_image
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


def test_cells_are_all_combinations():
    assert sweep.cells(["cfg=1,2", "temperature=1,1.05"]) == [
        {"cfg": 1, "temperature": 1},
        {"cfg": 1, "temperature": 1.05},
        {"cfg": 2, "temperature": 1},
        {"cfg": 2, "temperature": 1.05},
    ]
    assert sweep.cells([]) == []


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["steps=1,2"], "--sweep steps=1,2: give each of cfg, temperature, filter_threshold at most once"),
        (["cfg=1", "cfg=2"], "--sweep cfg=2: give each of"),
        (["cfg"], "--sweep cfg: cfg takes numbers with commas between them, as in cfg=1,1.05"),
        (["cfg=1,a"], "--sweep cfg=1,a: cfg takes numbers"),
        (["cfg=2,2.0"], "--sweep cfg=2,2.0: cfg takes finite numbers, each once"),
        (["cfg=inf"], "--sweep cfg=inf: cfg takes finite numbers"),
    ],
)
def test_bad_texts_are_refused_and_named(texts, message):
    with pytest.raises(UserError) as refused:
        sweep.cells(texts)
    assert str(refused.value).startswith(message)


SCORES = dict.fromkeys(("inception_score_std", "kid", "kid_std", "precision", "recall"))


def draw_and_score(cell, folder) -> dict:
    folder.mkdir(parents=True)
    return {"fid": (cell["cfg"] - 3) ** 2, "inception_score": cell["cfg"] * cell["temperature"], **SCORES}


def sweep_in(folder, **changes) -> None:
    settings = dict(
        cells=sweep.cells(["cfg=1,2,4", "temperature=1,1.05"]), num_images=6, seed=3, is_main=True
    )
    sweep.run(draw_and_score, folder=folder, **{**settings, **changes})


def test_each_cell_has_its_folder_and_the_table_the_plot_and_the_file_show_the_best(tmp_path, capsys):
    sweep_in(tmp_path)
    result = json.loads((tmp_path / "sweep.json").read_text())
    assert (result["best"], result["by"]) == ("cfg=2,temperature=1", "fid")
    assert (result["num_images"], result["seed"], len(result["rows"])) == (6, 3, 6)
    assert result["rows"][1] == {"cfg": 1, "temperature": 1.05, "fid": 4, "inception_score": 1.05, **SCORES}
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {
        f"cfg={cfg},temperature={temperature}" for cfg in (1, 2, 4) for temperature in (1, 1.05)
    }
    assert Image.open(tmp_path / "sweep.png").width == 1200
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in out[1:] if line.startswith("* cfg")] == ["cfg=2,temperature=1"]
    assert out[-1] == f"* best fid of 6 images each; in {tmp_path}: sweep.json, sweep.png"


def test_other_processes_draw_but_write_and_print_nothing(tmp_path, capsys):
    sweep_in(tmp_path, is_main=False)
    assert len(list(tmp_path.iterdir())) == 6
    assert not capsys.readouterr().out


def test_a_sweep_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "sweep.png").mkdir()
    with pytest.raises(UserError, match=r"sweep\.png: cannot be written \("):
        sweep_in(tmp_path)


def test_a_sweep_draws_each_cell_from_the_same_noise_and_scores_it(tmp_path, colour_network, capsys):
    real = tmp_path / "real"
    for i, values in enumerate(random_values(9, 8)):
        save_image(real / f"{i}.png", values)
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
    alone = images(tmp_path / "alone" / "generated")
    assert np.array_equal(swept, alone), "a run with these settings alone draws the same images"
    assert (swept != images(first)).any()


def test_a_sweep_by_another_network_goes_by_its_distance(tmp_path, colour_network, capsys):
    for i, values in enumerate(random_values(9, 8)):
        save_image(tmp_path / "real" / f"{i}.png", values)
    run(f"cfg=1,4 --features efficientnet_lite0 --fid_stats {tmp_path}/real", tmp_path)
    result = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    distances = [row["fd_efficientnet_lite0"] for row in result["rows"]]
    assert (result["by"], result["best"]) == (
        "fd_efficientnet_lite0",
        f"cfg={1 if distances[0] < distances[1] else 4}",
    )
    assert not {"fid", "inception_score"} & result["rows"][0].keys()
    assert Image.open(tmp_path / "sweep" / "sweep.png").width == 600
    out = capsys.readouterr().out
    assert "FD-EfficientNetLite0 ↓" in out
    assert "FID" not in out


def test_a_sweep_that_was_stopped_draws_only_what_is_missing(tmp_path, colour_network, monkeypatch):
    run("cfg=1,4", tmp_path)
    before = {name: images(tmp_path / "sweep" / name / "generated") for name in ("cfg=1", "cfg=4")}
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]
    (tmp_path / "sweep" / "sweep.json").unlink()
    (tmp_path / "sweep" / "cfg=4" / "generated" / "00002.png").unlink()
    drawn, plain = [], evaluation.images.draw
    monkeypatch.setattr(evaluation.images, "draw", lambda *args: drawn.extend(args[2]) or plain(*args))
    run("cfg=1,4", tmp_path)
    assert drawn == [2]
    for name, values in before.items():
        assert np.array_equal(images(tmp_path / "sweep" / name / "generated"), values)
    again = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]
    assert [row["inception_score"] for row in again] == [row["inception_score"] for row in rows]
    with pytest.raises(SystemExit, match="2"):
        run("cfg=1,4 --seed 1", tmp_path)


def test_without_a_reference_the_best_is_by_is_and_a_line_warns_of_it(tmp_path, colour_network, capsys):
    run("temperature=1,2", tmp_path)
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["by"] == "inception_score"
    assert "give --fid_stats to choose by FID" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("cfg=0.5,1", "--cfg 0.5 must be a finite number from 1"),
        ("temperature=0", "--temperature 0.0 must be a finite number above 0"),
        ("cfg=1,2 --class_num 0", "--cfg 2.0 needs classes"),
        ("cfg=1,2 --num_images 5", "--num_images 5 must be a multiple of --class_num 3"),
    ],
)
def test_every_cell_is_checked_before_the_first_is_drawn(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(flags, tmp_path)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
