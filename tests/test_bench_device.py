"""The sweep of `make bench DEVICE=...` on a CPU, with tiny models."""

import csv
import json

import bench_device
import numpy as np
import pytest
import torch

from evaluation.cost import sampling_cost
from models.fractalgen import build


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(bench_device, "PRODUCT_SIDE", {True: 64})
    monkeypatch.setattr(bench_device, "COPY_BYTES", {True: 2**16})


def run(tmp_path, capsys, *flags: str) -> dict:
    bench_device.main(["--device", "cpu", "--csv", str(tmp_path / "results" / "speed.csv"), *flags])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("name", ["fractalmar_tiny_in8", "fractalar_tiny_in8"])
def test_a_sweep_prints_json_and_appends_to_the_table(tmp_path, capsys, name):
    flags = ("--models", name, "--batches", "1", "3", "--seconds", "60")
    found, path = run(tmp_path, capsys, *flags), tmp_path / "results" / "speed.csv"
    with torch.device("meta"):
        model = build(name)
    flops = sum(sampling_cost(model, model.sampling_defaults)[0])
    assert [(row["model"], row["batch"]) for row in found["rows"]] == [(name, 1), (name, 3)]
    for row in found["rows"]:
        assert row["images_per_s"] == pytest.approx(1 / row["seconds_per_image"], rel=1e-3)
        assert row["arithmetic"] == pytest.approx(
            flops * row["images_per_s"] / found["peak"]["flops"], rel=1e-2
        )
        assert row["bandwidth"] > 0
        assert row["peak_gib"] > 0.01
        assert (row["timed_steps"], row["extrapolated"], row["chunk"]) == ("4 of 4", "no", "all")
        assert row["torch"] == torch.__version__
        assert row["card"]
        assert row["commit"]
    bench_device.append(path, found["rows"])
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 4
    assert table[1] == table[3] == {key: str(value) for key, value in found["rows"][-1].items()}


def test_without_time_for_all_steps_the_others_are_interpolated(tmp_path, capsys):
    flags = ("--models", "fractalmar_tiny_in8", "fractalar_tiny_in8", "--batches", "1", "--seconds", "1e-9")
    (row, *_) = run(tmp_path, capsys, *flags)["rows"]
    assert row["note"] == "no time was left"
    assert row["seconds_per_image"] == ""
    options = build("fractalmar_tiny_in32").sampling_defaults
    model = build("fractalmar_tiny_in32")
    row = bench_device.measure(model, 1, options, torch.float32, seconds=0.0)
    assert (row["timed_steps"], row["extrapolated"]) == ("3 of 32", "yes")
    assert bench_device.interpolated(np.array([1, 1, 2, 3]), {0: 1.0, 3: 5.0}) == 1 + 1 + 3 + 5


def test_a_batch_that_needs_too_much_memory_is_cut(monkeypatch):
    model, drawn = build("fractalmar_tiny_in8"), bench_device.Steps.time

    def time(steps, numbers):
        if steps.options.chunk is None or steps.options.chunk > fits:
            raise torch.OutOfMemoryError
        return drawn(steps, numbers)

    monkeypatch.setattr(bench_device.Steps, "time", time)
    fits, how = 2, (4, model.sampling_defaults, torch.float32, 60.0)
    row = bench_device.measure(model, *how)
    assert (row["chunk"], row["note"]) == (2, "out of memory without chunk")
    fits = 0
    assert bench_device.measure(model, *how) == {"note": "out of memory, even with chunk 1"}


def test_least_bytes_count_every_weight_of_a_network_at_each_call():
    model = build("fractalmar_tiny_guided_in32")
    parameters = sum(
        p.numel() for part in (model.generators[0], model.next_fractal) for p in part.parameters()
    )
    once = {"level0": 1, "guiding1": 1, "level1": 1, "rgb": 1}
    assert bench_device.least_bytes(model, once, torch.float32) == 4 * parameters
    assert bench_device.least_bytes(model, {**once, "level0": 0, "level1": 0}, torch.bfloat16) > 0


def test_the_table_of_the_repository_has_these_columns():
    with (bench_device.ROOT / "docs" / "results" / "speed.csv").open(newline="") as file:
        assert tuple(next(csv.reader(file))) == bench_device.COLUMNS
