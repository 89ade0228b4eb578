"""Costs as the paper states them, and as torch's counter sees them where a model really runs."""

from collections import Counter
from functools import cache

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import TINY, tiny_model
from evaluation.cost import forward_cost, sampling_cost, training_flops
from evaluation.report import cost_report, training_bytes
from models import fractalgen
from models.fractalgen import FractalGen
from models.generator import Mask
from models.mar import MAR
from models.sampling.ar import ARSampler
from models.sampling.canvas import Batch
from models.sampling.generate import build_sampler
from models.sampling.mar import MARSampler
from models.sampling.options import SamplingOptions
from models.sampling.pixel import PixelSampler
from models.sampling.prepare import Setup

TABLE_1 = {"fractalmar_in64": (215, 208, 15), "fractalmar_large_in256": (215, 208, 419, 22)}  # GFLOPs, paper


def on_meta(*args, **kwargs) -> FractalGen:
    with torch.device("meta"):
        return FractalGen(*args, **kwargs)


def preset(name: str) -> FractalGen:
    with torch.device("meta"):
        return fractalgen.__dict__[name]()


@cache
def preset_flops(name: str) -> list[int]:
    return forward_cost(preset(name))[0]


@pytest.mark.parametrize("name", TABLE_1)
def test_forward_cost_is_the_papers_table_1(name):
    assert [f / 1e9 for f in preset_flops(name)] == pytest.approx(TABLE_1[name], rel=0.02)


def test_256_px_cost_twice_64_px():
    small, large = (sum(preset_flops(name)) for name in TABLE_1)
    assert large / small == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("kind", ["ar", "mar"])
def test_two_levels_cost_5516_gflops(kind):
    """64 px in one sequence of 4096 pixels, of the 64 px model's width and depth (paper, Table 1)."""
    model = on_meta([64, 1], [1024, 128], [32, 3], [16, 4], [kind, "ar"])
    assert sum(forward_cost(model)[0]) / 1e9 == pytest.approx(5516, rel=0.02)


def test_attention_entries_are_counted_in_both_types(kind):
    """In levels of few tokens and of many, for which other kernels are taken."""
    assert forward_cost(tiny_model(kind).to("meta"))[1] == [16**2, 16 * 4**2]
    assert forward_cost(tiny_model(kind, img_size_list=[32, 2, 1]).to("meta"))[1] == [256**2, 256 * 4**2]


def test_training_flops_are_those_of_a_forward_pass(kind):
    """On a real model; on average 0.80 L + 0.5 of L patches are masked: 13 of 16 and 4 of 4."""
    model, masks, rows = tiny_model(kind), [], 1
    for generator, patches in zip(model.generators, (13, 4), strict=True):
        is_mar, length = isinstance(generator, MAR), generator.spec.num_patches
        masks.append(Mask.of((torch.arange(length) < patches).expand(rows, -1)) if is_mar else None)
        rows *= patches if is_mar else length
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # the CPU's fused kernel is not counted
        model(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.long), masks=masks)
    found = training_flops(model.to("meta"))
    assert sum(found) == counter.get_total_flops()
    assert all(flops > 0 for flops in found)
    assert training_flops(tiny_model(kind, grad_checkpointing=True).to("meta")) == found


@pytest.mark.parametrize(("kind", "interval"), [*((kind, 1) for kind in TINY), ("mar", 2), ("guided", 3)])
def test_sampling_costs_what_the_sampler_does(kind, interval, monkeypatch):
    """Operations and calls counted while a real image is drawn; levels of several blocks."""
    steps, scale = (3, 2), 1.0 if kind == "mar" else 3.0
    model, calls = tiny_model(kind, img_size_list=[4, 2, 1], num_blocks_list=[3, 1, 2]), Counter()
    options = SamplingOptions(steps, scale, feature_cache_interval=interval)
    flops, cost_calls = sampling_cost(model, options)
    for cls in (ARSampler, MARSampler):
        name = lambda sampler: f"level{sampler.generator.spec.index}"  # noqa: E731
        monkeypatch.setattr(cls, "predict", counted(cls.predict, name, calls))
    name = lambda head: "rgb" if head.cond_proj.transposed.shape[0] == 16 else "guiding1"  # noqa: E731  the guiding head: 32
    monkeypatch.setattr(PixelSampler, "pixels", counted(PixelSampler.pixels, name, calls))
    guidance = options.guidance(2)
    noise = model.noise(0, [0])
    with torch.no_grad():
        sampler = build_sampler(model, Setup(torch.float32, options))  # prepared once a call: not counted
        batch = Batch([guidance.double(model.fake_latent)] * model.num_conds, guidance, noise, steps)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            sampler.sample(batch)
    assert sum(flops) == counter.get_total_flops()
    assert cost_calls == calls
    assert ("guiding1" in cost_calls) == (kind == "guided")


def counted(function, name, calls):
    def wrapped(self, *args):
        calls[name(self)] += 1
        return function(self, *args)

    return wrapped


def test_memory_grows_with_the_batch_and_checkpointing_saves_some():
    deep = dict(num_blocks_list=[4, 4, 1], attn_dropout=0.0, proj_dropout=0.0)
    model = tiny_model("mar", **deep).to("meta").train()
    weights = sum(p.numel() * 4 for p in model.parameters())
    one, many = (training_bytes(model, batch_size) for batch_size in (1, 64))
    assert one["weights, gradients, moments"] == many["weights, gradients, moments"] == 4 * weights
    assert 4 * weights <= one["average peak"] <= one["largest peak"] < many["average peak"]
    less = training_bytes(tiny_model("mar", grad_checkpointing=True, **deep).to("meta").train(), 64)
    assert less["largest peak"] - 4 * weights < 0.7 * (many["largest peak"] - 4 * weights)


def test_the_report_has_every_line():
    steps, names = (2, 2, 2), ["level0", "level1", "level2", "rgb"]
    model = on_meta(
        [256, 16, 4, 1], [32, 16, 16, 8], [1] * 4, [2] * 4, ["mar", "mar", "mar", "ar"], guiding_pixel=True
    )
    report = cost_report(model, 2, SamplingOptions(steps, 2.0))
    every, below = (sum(p.numel() for p in part.parameters()) for part in (model, model.next_fractal))
    assert report["parameters"] == sum(report["parameters_by_level"].values()) == every
    assert report["parameters_by_level"]["level0"] == every - below
    assert list(report["parameters_by_level"]) == names
    assert report["attention_matrix_entries"] == {
        "one sequence of 256 x 256 pixels": 4_294_967_296,  # (256 ** 2) ** 2
        "level0": 256**2,
        "level1": 256 * 16**2,
        "level2": 1_048_576,  # 64 * 64 images of 4 x 4 pixels, (4 ** 2) ** 2 each
    }
    sampling = report["sampling"]
    assert sampling["network_calls"] == {
        "level0": 2,
        "guiding1": 2,
        "level1": 4,
        "guiding2": 4,
        "level2": 8,
        "rgb": 8,
    }
    for flops in (report["forward_gflops_per_image"], report["training_forward_gflops_per_image"],
                  sampling["gflops_per_image"]):  # fmt: skip
        assert list(flops) == [*names, "total"]
        assert sum(flops[name] for name in names) == pytest.approx(flops["total"], abs=0.01)
    alone = sum(sampling_cost(model, SamplingOptions(steps))[0]) / 1e9
    assert sampling["gflops_per_image"]["total"] == pytest.approx(2 * alone, rel=0.01)
