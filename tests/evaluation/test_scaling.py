"""The predictions of evaluation/scaling.py, held against counts, memory and small cases done by hand."""

import argparse
from dataclasses import replace

import pytest
import torch

from conftest import tiny_model
from evaluation import cost, report, scaling
from evaluation.scaling import Machine
from util.errors import UserError

MACHINE = Machine((1e9, 4e9), 1e9, 0.0, 16, 2.0, 2, 1e6, 1e5, 0.0)


BATCH = 3


@pytest.fixture(scope="module", params=["mar", "ar", "guided"])
def traced(request):
    model = tiny_model(request.param)
    return model, scaling.trace(model.arguments, BATCH)


def on_meta(model, **changes):
    with torch.device("meta"):
        return type(model)(**model.arguments | changes).train()


def test_a_trace_counts_the_matrix_products_of_a_step_and_all_weights(traced):
    model, step = traced
    counted = cost.training_flops(on_meta(model))
    forward = [step.work[step.parts == level, 0].sum() for level in range(len(counted))]
    assert forward == [BATCH * flops for flops in counted]
    backward = step.work[step.parts == -1, 0].sum()
    # twice the forward pass, but that nothing goes back to the images and AR attention is computed again
    assert 1.5 * sum(forward) < backward < 2.1 * sum(forward)
    assert sum(map(sum, step.units)) == sum(p.numel() for p in model.parameters())


def test_what_a_step_keeps_is_its_peak_without_the_gradients_of_all_weights(traced):
    model, step = traced
    weights = sum(p.nbytes for p in model.parameters())
    peak = report.training_bytes(on_meta(model), BATCH)["average peak"] - 3 * weights
    assert peak - weights <= step.kept <= 1.01 * peak  # attention keeps a little else on the CPU and on meta


def test_autocast_copies_all_weights_unless_they_are_gathered_in_its_type():
    large = dict(embed_dim_list=[512, 256, 64], num_blocks_list=[4, 2, 1], num_heads_list=[4, 4, 2])
    arguments = tiny_model("mar", **large).arguments | {"grad_checkpointing": True}
    full, half, sharded = (
        scaling.trace(arguments, 1, half=half, sharded=sharded)
        for half, sharded in ((False, False), (True, False), (True, True))
    )
    copies = 2 * sum(map(sum, full.units))
    assert half.kept - sharded.kept == pytest.approx(copies, rel=0.1)
    assert sharded.kept < full.kept


def test_messages_take_their_bytes_and_hops():
    assert MACHINE.message(1e6, 1) == 0
    assert MACHINE.message(1e6, 2) == 0.5  # half of it is here already
    assert MACHINE.message(1e6, 4) == 0.75 * 1e6 / 2e5  # two hosts, each with two connections
    slow = replace(MACHINE, latency=1.0)
    assert [slow.message(0, n) for n in (2, 4, 64)] == [1, 2, 32]  # a ring within a host and one of hosts
    assert MACHINE.message(1e6, 2, passes=2) == 1


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
    one = scaling.predict(step, MACHINE, 1)
    assert one["waiting"] == one["sent_gb"] == 0
    assert one["seconds"] == one["computing"]
    empty, weights = replace(step, kept=0), sum(map(sum, step.units))
    divided = replace(empty, sharded=True)
    sent = lambda step, **how: scaling.predict(step, MACHINE, 4, **how)["sent_gb"] * 1e9  # noqa: E731
    assert sent(empty) == pytest.approx(8 * 3 / 4 * weights, rel=1e-3)
    assert sent(divided, accum=2) == pytest.approx(3 * sent(empty), rel=1e-3)  # float32: 12 bytes, twice
    assert sent(replace(divided, half=True)) == pytest.approx(sent(empty), rel=1e-3)
    gib = lambda step, n, **how: scaling.predict(step, MACHINE, n, **how)["gib"] * 2**30  # noqa: E731
    assert gib(empty, 1, averaged=True) == pytest.approx(20 * weights, rel=1e-3)
    assert gib(empty, 4) == pytest.approx(20 * weights, rel=1e-3)  # DDP's buckets
    largest = max(max(of_level) for of_level in step.units)
    assert gib(divided, 4) == pytest.approx(16 * weights / 4 + 16 * largest, rel=1e-3)


def test_more_batches_of_a_step_cost_their_share(traced):
    _, step = traced
    one, two = (scaling.predict(step, MACHINE, 2, accum=accum) for accum in (1, 2))
    assert two["images_per_s"] > one["images_per_s"]
    price = 2.0 / 3600 * 2 * one["seconds"] / (2 * BATCH)
    assert one["dollars_per_million_images"] == pytest.approx(price * 1e6, rel=1e-3)


def test_the_flag_prints_a_line_that_says_predicted_and_unknown_gpus_are_named():
    flags = dict(
        gpu="h100", gpus=8, amp=None, batch_size=2, accum_iter=1, shard=True, ema=None, optimizer="adamw"
    )
    args, lines = argparse.Namespace(**flags, grad_checkpointing=False), []
    found = scaling.predict_step(args, tiny_model("mar").arguments, lines)["prediction"]
    assert lines[0].startswith("predicted, not measured: 8 h100, sharded, 16 bits: ")
    assert found["seconds"] > 0
    for flag, value, said in (("optimizer", "muon", "not of --optimizer muon"), ("gpus", 1, "--gpus 1")):
        with pytest.raises(UserError, match=said):
            scaling.predict_step(argparse.Namespace(**vars(args) | {flag: value}), {}, lines)
    args.gpu = "h1"
    with pytest.raises(UserError, match="--gpu h1: not known; one of a100, h100, h200, b200"):
        scaling.predict_step(args, {}, lines)
    args.gpus = 0
    assert scaling.predict_step(args, {}, lines) == {}
