"""demo/paper.py: the work, its order, what fails, the verdicts, and the table, with tiny models."""

import json
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import paper
import paper_table
import paper_work
import pytest

from models.hub.presets import PRESETS
from util.data.idx import find_idx, read_idx
from util.files import try_lock
from util.run.settings import TINY


def write_idx(folder, split, count):
    values = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = np.arange(count, dtype=np.uint8) % 10
    for kind, array in (("images-idx3", values), ("labels-idx1", labels)):
        header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
        (folder / f"{split}-{kind}-ubyte").write_bytes(header + array.tobytes())


def scored(arguments: list[str]) -> None:
    """In place of evaluation.score, whose network is large."""
    (paper.results.ROOT / arguments[0] / "metrics.json").write_text(
        json.dumps({"scores": {paper_work.DISTANCE: 5.0}})
    )


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Folders of this test, and every number so small that all work takes seconds."""
    data = tmp_path / "data"
    data.mkdir()
    write_idx(data, "train", 130)
    write_idx(data, "t10k", 20)
    numbers = dict(FEW=2, MANY=3, BATCH=10, NUM_TEST=10, NUM_IMAGES=10, NUM_EDITS=3, NUM_TIMED=1, ROUNDS=1)
    cells = dict(STEPS=(1, 2), SCALES=(2,), find_data=lambda: data, OUTPUT=tmp_path / "work")
    for name, value in {**numbers, **cells}.items():
        monkeypatch.setattr(paper_work, name, value)
    models = {
        name: replace(preset, sizes=(28, 14, 1), widths=(8, 8, 8), blocks=(1, 1, 1), heads=(2, 2, 2))
        for name, preset in paper_work.MODELS.items()
        if name in ("ar3", "mar3")
    }
    monkeypatch.setattr(paper_work, "MODELS", models)
    for name, model in models.items():
        monkeypatch.setitem(PRESETS, f"paper_{name}", model)  # and so they are gone after the test
    monkeypatch.setattr(paper_work.score, "main", scored)
    monkeypatch.setattr(paper_work, "load_classifier", lambda: lambda images: np.zeros(len(images), int))
    monkeypatch.setattr(paper_table, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(paper_table, "PAGE", tmp_path / "paper.md")
    monkeypatch.setattr(paper, "WAIT", 0.01)
    return tmp_path


def call(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["paper.py", *arguments])
    paper.main()


def test_all_work_on_one_model_leaves_results_with_what_repeats_them(small, monkeypatch):
    for name in ("draw-mar3-1-linear-2-1", "edit-mar3-1", "pace-0", "real"):
        if name == "pace-0":  # it times all models
            monkeypatch.setattr(paper_work, "STEPS", (1,))
        call(monkeypatch, "--only", name)
    found = {path.stem: json.loads(path.read_text()) for path in (small / "results").glob("*.json")}
    trained = "train-mar3-3-1"
    assert sorted(found) == sorted(
        [
            "data",
            "classifier",
            "reference",
            "real",
            "pace-0",
            trained,
            "draw-mar3-1-linear-2-1",
            "edit-mar3-1",
        ]
    )
    assert {file["threads"] for file in found.values()} == {1}
    assert found[trained]["command"] == f"python demo/paper.py --only {trained}"
    assert 0 < found[trained]["result"]["bits_per_dim"] == found[trained]["result"]["bits_per_dim_cell"] < 12
    assert "--seed 1" in found[trained]["result"]["flags"]
    drawn = found["draw-mar3-1-linear-2-1"]["result"]
    assert (drawn["images"], drawn["fd"], drawn["read_as_asked"]) == (10, 5.0, 0.1)
    assert drawn["seam"] > 0
    labels = np.arange(3)
    assert found["edit-mar3-1"]["result"]["own_read_as_asked"] == (labels == 0).mean()
    assert found["edit-mar3-1"]["result"]["another_read_as_asked"] == 0
    assert found["pace-0"]["result"]["minutes_ar3"] == 3 * found["pace-0"]["result"]["step_ar3"] / 60


def test_short_and_long_trainings_get_the_first_images_and_the_first_test_images(small):
    (small / "work").mkdir()
    assert paper_work.write_data()["training_images"] == [20, 30]
    for kind in ("images-idx3", "labels-idx1"):
        axes = int(kind[-1])
        whole = {
            split: read_idx(find_idx(paper_work.find_data(), split, kind), axes) for split in ("train", "val")
        }
        for steps, split, count in ((2, "train", 20), (3, "train", 30), (3, "val", 10)):
            part = read_idx(find_idx(small / "work" / f"data-{steps}", split, kind), axes)
            assert np.array_equal(np.asarray(part[:]), np.asarray(whole[split][:count]))


def test_a_training_that_a_signal_ended_is_no_result(small, monkeypatch):
    (small / "work").mkdir()
    folder = small / "work" / "train-ar3-2-0"
    folder.mkdir()
    (folder / "log.txt").write_text('{"step": 1, "train/loss": 3.0}\n')
    monkeypatch.setattr(paper_work.main_fractalgen, "main", lambda words: None)
    with pytest.raises(KeyboardInterrupt):
        paper_work.train("ar3", 2, 0)


def test_what_fails_stops_only_what_needs_it(small, monkeypatch, capsys):
    done = []

    def fail():
        raise SystemExit(2)

    jobs = {
        "good": paper_work.Job(1, lambda: {"x": 1}),
        "bad": paper_work.Job(1, fail),
        "after bad": paper_work.Job(1, lambda: {"x": 1}, ("bad",)),
        "after good": paper_work.Job(1, lambda: done.append(1) or {"x": 2}, ("good",)),
    }
    monkeypatch.setattr(paper_work, "jobs", lambda: jobs)
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            call(monkeypatch, "--all")
        assert ended.value.code == 1
        assert "failed: bad: SystemExit: 2\nfailed: after bad: needs bad\n" in capsys.readouterr().err
    assert done == [1]  # the second call repeats nothing that is done
    assert paper_table.read("after good") == {"x": 2}
    jobs["bad"] = paper_work.Job(1, lambda: {"x": 3})
    call(monkeypatch, "--all")
    assert paper_table.is_done("after bad")


def test_ctrl_c_ends_the_program(small, monkeypatch):
    def interrupted():
        raise SystemExit(130)

    monkeypatch.setattr(paper_work, "jobs", lambda: {"one": paper_work.Job(1, interrupted)})
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "--all")
    assert ended.value.code == 130


def test_two_processes_share_the_work(small, monkeypatch):
    (small / "work").mkdir()
    (small / "results").mkdir()
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    path = small / "work" / "theirs.lock"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"locked\n"
        order = []

        def finish(seconds):  # the other process writes its result while this one waits
            order.append("waited")
            (small / "results" / "theirs.json").write_text('{"result": {}}')

        monkeypatch.setattr(paper.time, "sleep", finish)
        jobs = {
            "theirs": paper_work.Job(1, lambda: order.append("theirs") or {}),
            "ours": paper_work.Job(1, lambda: order.append("ours") or {}),
            "after": paper_work.Job(1, lambda: order.append("after") or {}, ("theirs",)),
        }
        assert paper.run_all(list(jobs), jobs) == {}
        assert order == ["ours", "waited", "after"]
        other.stdin.close()
    assert try_lock(path, {})[0] is not None


def test_every_line_of_the_table_is_work_that_is_listed(capsys, monkeypatch):
    jobs, lines = paper_work.jobs(), paper_table.lines()
    assert {name for line in lines for name in line.names} <= jobs.keys()
    assert {need for job in jobs.values() for need in job.needs} <= jobs.keys()
    assert {line.row for line in lines} == paper_table.CLAIMS.keys()
    in_table = set(paper.with_needs((name for line in lines for name in line.names), jobs))
    assert jobs.keys() == in_table  # nothing is done for no line
    assert all(job.minutes <= 15 for job in jobs.values())
    call(monkeypatch, "--list")
    listed = capsys.readouterr().out
    assert all(f" {name} " in listed for name in jobs)


def test_a_row_needs_its_trainings_and_an_unknown_one_is_an_error(capsys, monkeypatch):
    jobs = paper_work.jobs()
    names = paper.choose("i", jobs)
    assert [name for name in names if name.startswith("train")] == [
        f"train-{model}-{paper_work.MANY}-{seed}" for seed in (0, 1) for model in ("ar3", "mar3")
    ]
    assert names.index("data") < names.index(f"train-ar3-{paper_work.MANY}-0") < names.index("edit-ar3-0")
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "--only", "z")
    assert ended.value.code == 2
    assert "--only z: no row of the table" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "claim", "judged"),
    [
        ([[3.0, 3.1], [2.8, 2.8]], "falls", "holds"),
        ([[3.0, 3.1], [2.8, 2.8]], "rises", "does not hold"),
        ([[3.0, 3.1], [3.0, 2.95]], "falls", "no difference"),
        ([[9, 9], [5, 5], [6, 6], [3, 3]], "falls", "holds, not throughout"),
        ([[9, 9], [5, 6], [5.6, 5.5], [3, 3]], "falls", "holds"),  # the rise lies within the spread
        ([[1, 1], [2, 2]], "rises", "holds"),
    ],
)
def test_a_difference_counts_where_it_exceeds_the_spread_over_seeds(values, claim, judged):
    assert paper_table.verdict(values, claim) == judged


def test_the_seam_compares_steps_across_borders_with_those_inside():
    rng = np.random.default_rng(0)
    smooth = np.tile(np.arange(28, dtype=np.uint8), (2, 28, 1))
    smooth = smooth + smooth.swapaxes(1, 2)
    assert paper_work.seam(smooth) == 1
    tiles = np.kron(rng.integers(0, 200, (2, 7, 7)), np.ones((1, 4, 4))).astype(np.uint8)
    assert paper_work.seam((tiles + smooth).astype(np.uint8)) > 10
    noise = rng.integers(0, 256, (200, 28, 28), dtype=np.uint8)
    assert abs(paper_work.seam(noise) - 1) < 0.02


def test_the_table_is_written_between_its_marks_and_is_not_wide(small, monkeypatch):
    (small / "results").mkdir()
    page = f"before\n{paper_table.MARKS[0]}\nlast week\n{paper_table.MARKS[1]}\nafter\n"
    paper_table.PAGE.write_text(page)
    call(monkeypatch, "--table")
    empty = paper_table.PAGE.read_text()
    assert empty.startswith("before\n")
    assert empty.endswith("after\n")
    assert "last week" not in empty
    assert not any(word in empty for word in ("holds", "difference"))
    for name in {name for line in paper_table.lines() for name in line.names}:
        worst = 1234.5 if name == "count" else 123.4 + name.endswith("1")
        keys = {key for line in paper_table.lines() for names, key in line.cells}
        content = {"result": dict.fromkeys(keys, worst), "threads": 1, "processor": "P", "cpu_seconds": 360}
        (small / "results" / f"{name}.json").write_text(json.dumps(content))
    call(monkeypatch, "--table")
    full = paper_table.PAGE.read_text()
    assert "no difference |" in full
    assert "123.900 (1.000), 123.900 (1.000)" in full
    assert "of the processor, 1 thread of P." in full
    call(monkeypatch, "--table")
    assert paper_table.PAGE.read_text() == full


def test_lines_of_the_page_are_short():
    page = paper_table.ROOT / "docs" / "paper.md"
    assert max(map(len, page.read_text(encoding="utf-8").splitlines())) <= 110


def test_the_pace_is_measured_with_the_dropout_of_the_trainings(monkeypatch):
    built = []
    monkeypatch.setattr(paper_work, "FractalGen", lambda **arguments: built.append(arguments))
    monkeypatch.setattr(paper_work.engine, "make_optimizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        paper_work.pace(0)
    assert len(built) == len(paper_work.MODELS)
    for name in ("attn_dropout", "proj_dropout"):
        assert {arguments[name] for arguments in built} == {TINY[name]}
