import numpy as np
import torch
from scipy.stats import chisquare

from models.sampling.guidance import Guidance, inverse_cdf


def test_draws_follow_the_probabilities():
    probs = torch.rand(1, 256).softmax(-1).expand(200_000, -1)
    drawn = inverse_cdf(probs, torch.rand(200_000))
    counts = np.bincount(drawn.numpy(), minlength=256)
    assert (
        chisquare(counts, probs[0].double().numpy() / probs[0].double().sum().item() * 200_000).pvalue > 0.001
    )


def test_a_value_of_probability_zero_is_never_drawn():
    probs = torch.zeros(4, 256)
    probs[:, 7] = 0.5
    probs[:, 9] = 0.5
    uniforms = torch.tensor([0.0, 0.499, 0.5001, 1 - 2**-24])
    assert inverse_cdf(probs, uniforms).tolist() == [7, 7, 9, 9]


def test_unguided_is_softmax_with_inverse_temperature():
    logits = torch.randn(3, 256)
    guidance = Guidance.create(1.0, "linear", 1.3, 0.0)
    assert not guidance.doubled
    torch.testing.assert_close(guidance.probabilities(logits), (1.3 * logits).softmax(-1))


def test_guidance_by_the_formula_without_filter():
    cond, uncond = torch.randn(2, 3, 256)
    guidance = Guidance.create(4.0, "constant", 1.0, 0.0)
    torch.testing.assert_close(
        guidance.probabilities(torch.cat([cond, uncond])), (uncond + 4 * (cond - uncond)).softmax(-1)
    )


def test_the_filter_keeps_improbable_values_improbable():
    cond, uncond = torch.zeros(2, 1, 256)
    # Value 1 is very improbable, and even more improbable without the class, so that guidance would favour it.
    cond[:, 0], cond[:, 1], uncond[:, 1] = 12.0, -12.0, -40.0
    logits = torch.cat([cond, uncond])
    assert Guidance.create(4.0, "constant", 1.0, 0.0).probabilities(logits)[0, 1] > 0.99
    assert Guidance.create(4.0, "constant", 1.0, 1e-4).probabilities(logits)[0, 1] < 1e-6


def test_schedules():
    linear, constant = (Guidance.create(5.0, schedule, 1.0, 0.0) for schedule in ("linear", "constant"))
    cpu = torch.device("cpu")
    assert [linear.at(p, cpu).scale.item() for p in (0.0, 0.5, 1.0)] == [1.0, 3.0, 5.0]
    assert constant.at(0.25, cpu).scale.item() == 5.0
    assert linear.at(0.0, cpu).doubled  # decided once, whatever the scale of this step is
