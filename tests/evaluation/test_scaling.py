"""The predictions of evaluation/scaling.py, held against counts, memory and small cases done by hand."""

import argparse
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import tiny_model
from evaluation import cost, report, scaling
from evaluation.scaling import Machine, Trace
from util.errors import UserError

MACHINE = Machine((1e9, 4e9), 1e9, 0.0, 16, 2.0, 2, 1e6, 1e5, 0.0)


@pytest.fixture(scope="module", params=["mar", "ar", "guided"])
def traced(request):
    model = tiny_model(request.param)
    return model, scaling.trace(model.arguments, half=False)


def test_a_trace_counts_the_matrix_products_of_a_step_and_all_weights(traced):
    model, step = traced
    with torch.device("meta"):
        empty = type(model)(**model.arguments).train()
    counted = cost.training_flops(empty)
    forward = [step.work[step.parts == level, 0].sum(0) for level in range(len(counted))]
    for level, flops in enumerate(counted):
        assert forward[level].tolist() == [batch * flops for batch in scaling.TRACED]
    backward = step.work[step.parts == -1, 0].sum(0)
    # twice the forward pass, but that nothing goes back to the images and AR attention is computed again
    assert (1.5 * sum(forward) < backward).all()
    assert (backward < 2.1 * sum(forward)).all()
    assert sum(map(sum, step.units)) == sum(p.numel() for p in model.parameters())


def test_what_is_known_of_two_batches_tells_a_third(traced):
    model, step = traced
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "TRACED", (4, 8))
        other = scaling.trace(model.arguments, half=False)
    more = scaling._of(8, step.work)
    assert more.sum(0) == pytest.approx(other.work[..., 1].sum(0), rel=0.01)
    assert scaling._of(8, step.kept) == pytest.approx(other.kept[1], rel=0.02)


def test_what_a_step_keeps_is_its_peak_without_the_gradients_of_all_weights(traced):
    model, step = traced
    with torch.device("meta"):
        empty = type(model)(**model.arguments).train()
    weights = sum(p.nbytes for p in empty.parameters())
    for batch_size, kept in zip(scaling.TRACED, step.kept, strict=True):
        peak = report.training_bytes(empty, batch_size)["average peak"] - 3 * weights
        assert peak - weights <= kept <= 1.01 * peak  # attention keeps a little else on the CPU and on meta


def test_autocast_halves_what_blocks_read_and_write(traced):
    model, step = traced
    half = scaling.trace(model.arguments, half=True)
    assert half.kept[1] < step.kept[1]
    assert half.half
    gib = lambda **how: scaling.predict(half, MACHINE, 1, 2, **how)["gib"] * 2**30  # noqa: E731
    weights, largest = sum(map(sum, step.units)), max(max(of_level) for of_level in step.units)
    # a sharded model has two gathered units in place of autocast's copy of each weight
    assert gib() - gib(sharded=True) == pytest.approx(2 * weights - 4 * largest, rel=0.01)


def test_messages_take_their_bytes_and_hops():
    assert MACHINE.message(1e6, 1) == 0
    assert MACHINE.message(1e6, 2) == 0.5  # half of it is here already
    assert MACHINE.message(1e6, 4) == 0.75 * 1e6 / 2e5  # two hosts, each with two connections
    slow = replace(MACHINE, latency=1.0)
    assert [slow.message(0, n) for n in (2, 4, 64)] == [1, 3, 12]


def test_units_wait_for_their_weights_only_where_computing_is_shorter():
    waits = lambda seconds, gathers, scatters: scaling._pipeline(seconds, gathers, scatters, True)  # noqa: E731
    assert waits([5, 5, 5], [1, 1, 1], [0, 0, 0]) == 1  # for the first one
    assert waits([1, 1, 1], [5, 5, 5], [0, 0, 0]) == 5 + 5 + 5 - 2  # while one computes, the next comes
    assert waits([5, 5, 5], [1, 1, 1], [2, 2, 2]) == 1 + 2  # and the last gradients go
    assert scaling._pipeline([5, 5], [1, 1], [2, 2], False) == 6


def test_gradients_wait_for_a_full_bucket_and_go_while_others_are_computed(monkeypatch):
    monkeypatch.setattr(scaling, "BUCKET", 8)
    units = [(2, 1.0)] * 4  # 8 bytes of gradients each
    one = lambda size: size / 8  # noqa: E731  a second
    assert scaling._buckets(units, 1.0, one) == 1  # the last bucket
    assert scaling._buckets(units, 0.5, one) == 0.5 + 4 - 2  # the network is the slower one
    monkeypatch.setattr(scaling, "BUCKET", 1000)
    assert scaling._buckets(units, 1.0, one) == 4


def test_sharding_divides_weights_and_moments_and_one_process_waits_for_nothing(traced):
    _, step = traced
    one = scaling.predict(step, MACHINE, 1, 4)
    assert one["waiting"] == one["sent_gb"] == 0
    assert one["seconds"] == one["computing"]
    sent = lambda **how: scaling.predict(step, MACHINE, 4, 4, **how)["sent_gb"] * 1e9  # noqa: E731
    assert sent() == pytest.approx(8 * 3 / 4 * sum(map(sum, step.units)), rel=1e-3)
    assert sent(sharded=True, accum=2) == pytest.approx(3 * sent(), rel=1e-3)  # float32: 12 bytes, twice
    no_images = Trace(step.work, step.parts, np.zeros(2), step.units, step.half)
    weights = sum(map(sum, step.units))
    gib = lambda n, **how: scaling.predict(no_images, MACHINE, n, 4, **how)["gib"] * 2**30  # noqa: E731
    assert gib(1, averaged=True) == pytest.approx(20 * weights, rel=1e-3)
    assert gib(4) == pytest.approx(20 * weights, rel=1e-3)  # DDP's buckets
    largest = max(max(of_level) for of_level in step.units)
    assert gib(4, sharded=True) == pytest.approx(16 * weights / 4 + 8 * largest, rel=1e-3)


def test_more_images_and_batches_cost_their_share(traced):
    _, step = traced
    four, eight = (scaling.predict(step, MACHINE, 2, batch) for batch in (4, 8))
    assert 1.5 < eight["computing"] / four["computing"] < 2.1
    twice = scaling.predict(step, MACHINE, 2, 4, accum=2)
    assert twice["images_per_s"] > four["images_per_s"]
    price = 2.0 / 3600 * 2 * four["seconds"] / 8 * 1e6
    assert four["dollars_per_million_images"] == pytest.approx(price, rel=1e-3)


def test_the_flag_prints_a_line_that_says_predicted_and_unknown_gpus_are_named():
    flags = dict(gpu="h100", gpus=8, amp=None, batch_size=2, accum_iter=1, shard=True, ema=None)
    args, lines = argparse.Namespace(**flags, grad_checkpointing=False), []
    found = scaling.predict_step(args, tiny_model("mar").arguments, lines)["prediction"]
    assert lines[0].startswith("predicted, not measured: 8 h100, sharded, bfloat16: ")
    assert found["seconds"] > 0
    args.gpus = 0
    assert scaling.predict_step(args, {}, lines) == {}
    args.gpu = "h1"
    with pytest.raises(UserError, match="--gpu h1: not known; one of a100, h100, h200, b200"):
        scaling.predict_step(args, {}, lines)
