from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import kstest, truncnorm

from conftest import random_values, tiny_model
from models.generator import ForwardOptions, Mask
from models.mar import cosine_plan, masked_counts
from util.pixels import RGB


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9, 16, 25, 64, 256])
def test_the_plan_visits_each_patch_once_for_every_number_of_steps(length):
    for num_iter in [*range(1, min(length, 30) + 1), length, length + 5]:
        plan = list(cosine_plan(length, num_iter))
        assert len(plan) == min(length, num_iter)
        assert plan[0][0] == 0
        assert plan[-1][1] == length
        assert all(before[1] == after[0] for before, after in pairwise(plan))
        assert all(end > begin for begin, end, _ in plan)
        assert all(0 <= progress < 1 for *_, progress in plan)


def test_training_ratios_are_a_truncated_normal():
    uniforms = np.random.default_rng(0).random(20_000)
    ratios = masked_counts(uniforms, 10**6, train=True) / 10**6
    assert kstest(ratios, truncnorm(-4, 0, loc=1.0, scale=0.25).cdf).pvalue > 0.01


def test_evaluation_counts_are_uniform_on_one_to_length():
    counts = masked_counts(np.random.default_rng(0).random(40_000).astype(np.float32), 16, train=False)
    share = np.bincount(counts, minlength=17)[1:] / len(counts)
    assert counts.min() == 1
    assert counts.max() == 16
    assert abs(share - 1 / 16).max() < 0.006
    assert masked_counts(np.array([0.0, 1 - 2**-24]), 16, train=True).tolist() == [1, 16]


def test_masked_pixels_do_not_reach_the_conditions():
    model = tiny_model("mar")
    generator, conds = model.generator, [torch.randn(2, 32)] * 5
    mask = Mask.of(torch.rand(2, 16) < 0.6)
    images = RGB.normalize(random_values(2, 8))
    changed = RGB.normalize(random_values(2, 8, seed=1))
    keep = mask.masked.view(2, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    mixed = torch.where(keep, changed, images)
    before, after = (generator(x, conds, ForwardOptions([mask])) for x in (images, mixed))
    for a, b in zip(before.conds, after.conds, strict=True):
        assert torch.equal(a, b)


def test_the_order_of_sampling_is_a_random_permutation_of_each_image():

    model = tiny_model("mar")
    order = model.generator.order(model.noise(0, range(50)).order_uniforms)
    assert torch.equal(order.sort(-1).values, torch.arange(16).expand(50, -1))
    assert len({tuple(row) for row in order.tolist()}) == 50
