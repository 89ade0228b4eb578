"""Weights and settings that make numbers infinite or NaN are named; before, such images were white."""

import math

import pytest
import torch
from opcount import OpCount

from conftest import random_values, tiny_model
from models.likelihood.inside import look_inside
from models.sampling.constraints import Grey, Palette
from util.errors import UserError

QUIET = dict(progress_bar=False)
DRAW = dict(num_inference_steps=(1, 1), seed=0, output_type="pt", **QUIET)
WEIGHTS = (  # parts of names: at least one weight of each kind of model has each
    "class_emb", "fake_latent", "generator.norm.weight", "generator.blocks.0.attn.qkv.weight",
    "generator.blocks.0.attention.wqkv.weight", "r_mlm.bias",
)  # fmt: skip


def spoil(model, name: str, value: float):
    """Replaces the first number of the last weight whose name contains `name`. Returns the weight's name."""
    name, weight = [(n, w) for n, w in model.named_parameters() if name in n][-1]
    with torch.no_grad():
        weight.view(-1)[0] = value
    return name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_images_of_a_model_with_a_weight_that_is_not_finite_are_refused(kind, scale, bad):
    model = tiny_model(kind)
    sound = {name: value.clone() for name, value in model.state_dict().items()}
    model.generate([0, 1], guidance_scale=scale, **DRAW)
    for part in WEIGHTS:
        if any(part in name for name in sound):
            name = spoil(model, part, bad)
            with pytest.raises(UserError, match=rf"^weight {name} of the model is not finite \({bad}\)"):
                model.generate([0, 1], guidance_scale=scale, **DRAW)
            model.load_state_dict(sound)


@pytest.mark.parametrize("pick", ["the library's", "the caller's"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_settings_that_overflow_are_named(kind, scale, pick):
    model = tiny_model(kind)
    conds = [model.class_emb(torch.tensor([0] * int(scale)))] * model.num_conds
    other = {"pick": lambda probs, uniforms: probs.argmax(-1)} if pick == "the caller's" else {}
    with torch.no_grad():
        for _, bias in [(n, w) for n, w in model.named_parameters() if "mlm.bias" in n]:
            bias.fill_(9)
    model.sample(conds, (1, 1), scale, temperature=1e3, **other)
    with pytest.raises(
        UserError, match=r"temperature 1e\+38, guidance scale .* overflow, although all weights"
    ):
        model.sample(conds, (1, 1), scale, temperature=1e38, **other)


def test_a_compiler_does_not_take_zero_times_nan_for_zero():
    """`PixelSampler` marks pixels by it, also where its code is compiled."""
    mark = torch.compile(lambda pixels, probs: pixels.clone().add_(probs, alpha=0))
    marked = mark(torch.ones(3), torch.tensor([0.0, 1.0, torch.nan]))
    assert marked.isfinite().tolist() == [True, True, False]


@pytest.mark.parametrize("constraint", [None, Grey(), Palette([[0, 0, 0], [9, 9, 9]])])
def test_edits_name_the_weight_too(kind, constraint):
    model, mask = tiny_model(kind), torch.zeros(8, 8, dtype=torch.bool)
    mask[1:4, 2:7] = True
    name = spoil(model, "r_mlm.bias", math.nan)
    with pytest.raises(UserError, match=f"weight {name}"):
        model.edit(random_values(1, 8), mask, 1, constraint=constraint, **DRAW)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_likelihoods_name_the_weight_too(kind, bad):
    model, image = tiny_model(kind), random_values(1, 8)
    name = spoil(model, "qkv.weight", bad)
    for measure in (
        lambda: model.log_likelihood(image, 1, num_orders=1, **QUIET),
        lambda: model.classify(image, num_orders=1, **QUIET),
        lambda: look_inside(model, image, (0, 0), 1),
    ):
        with pytest.raises(UserError, match=f"weight {name} of the model is not finite"):
            measure()


def test_a_likelihood_that_overflows_is_refused():
    model = tiny_model("ar")
    with torch.no_grad():
        model.next_fractal.next_fractal.g_mlm.bias.fill_(3e38)
        model.next_fractal.next_fractal.g_mlm.bias[0, :9] = -3e38
    with pytest.raises(UserError, match=r"likelihood is not finite: numbers overflow, although all weights"):
        model.log_likelihood(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 1, **QUIET)


def test_weights_that_are_large_but_do_no_harm_are_accepted():
    model = tiny_model("ar")
    spoil(model, "class_emb", 1e30)  # of class 0
    model.generate([1], **DRAW)


def test_the_host_waits_once_for_a_whole_sampling_call(kind):
    model = tiny_model(kind)
    with OpCount() as ops:
        model.generate([0, 1], **DRAW)
    assert ops.syncs == {"_local_scalar_dense": 1}
