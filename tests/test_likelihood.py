"""Bits of each picture, against brute force over every mask of a model small enough to list them."""

import itertools
import math

import pytest
import torch

from conftest import random_levels, tiny_model
from models.fractalgen import FractalGen
from models.generator import Mask
from models.likelihood import bits_by_term
from models.noise import Noise
from util.pixels import normalize


def bits(model, pictures, masks):
    _, terms = model(
        pictures, torch.zeros(len(pictures), dtype=torch.long), masks=masks, train=False, dither=0.0, return_terms=True
    )
    return bits_by_term(model, terms, masks, len(pictures))


def test_ar_bits_are_the_loss_of_each_picture():
    model, pictures = tiny_model("ar"), normalize(random_levels(3, 8))
    found = bits(model, pictures, [None, None])["rgb"]
    for i in range(3):
        loss = model(pictures[i : i + 1], torch.zeros(1, dtype=torch.long))
        assert found[i].item() == pytest.approx(loss.item() * 3 * 64 / math.log(2), rel=1e-5)


def test_mar_estimate_averages_to_the_mean_over_all_orders():
    """Four pixels, one level: the expectation over (count uniform, subset uniform) is the mean NLL over all 24 orders."""
    torch.manual_seed(0)
    model = FractalGen([2, 1], [16, 16], [1, 1], [2, 2], ["mar", "ar"], class_num=2, num_conds=1).eval()
    pictures = normalize(random_levels(1, 2))

    def masked_bits(masked: set[int]) -> float:
        return bits(model, pictures, [Mask.of(torch.tensor([[i in masked for i in range(4)]]))])["rgb"].item()

    subsets = [set(c) for n in range(1, 5) for c in itertools.combinations(range(4), n)]
    estimate = sum(masked_bits(s) / math.comb(4, len(s)) for s in subsets) / 4

    def step_bits(known: tuple[int, ...], pixel: int) -> float:
        """-log2 p(pixel | known), from the mask that hides all that is not known."""
        mask = Mask.of(torch.tensor([[i not in known for i in range(4)]]))
        _, (term,) = model(pictures, torch.zeros(1, dtype=torch.long), masks=[mask], train=False, return_terms=True)
        return term.nll[mask.rows.tolist().index(pixel)].sum().item() / math.log(2)

    orders = list(itertools.permutations(range(4)))
    brute = sum(step_bits(order[:k], order[k]) for order in orders for k in range(4)) / len(orders)
    assert estimate == pytest.approx(brute, rel=1e-5)


def test_two_mar_levels_average_to_the_mean_over_all_orders_of_both():
    """Brute force over the orders of level 0's patches and, in each patch, of its pixels."""
    torch.manual_seed(0)
    sizes = dict(img_size_list=[4, 2, 1], embed_dim_list=[16] * 3, num_blocks_list=[1] * 3, num_heads_list=[2] * 3)
    model = FractalGen(**sizes, generator_type_list=["mar", "mar", "ar"], class_num=2, num_conds=5).eval()
    pictures = normalize(random_levels(1, 4))
    subsets = [frozenset(c) for n in range(1, 5) for c in itertools.combinations(range(4), n)]
    hide = lambda hidden, rows: Mask.of(torch.tensor([[i in hidden for i in range(4)]] * rows))  # noqa: E731

    estimate, pixel_bits = 0.0, {}
    for outer, inner in itertools.product(subsets, subsets):
        masks = [hide(outer, 1), hide(inner, len(outer))]
        _, terms = model(pictures, torch.zeros(1, dtype=torch.long), masks=masks, train=False, return_terms=True)
        chance = 1 / (4 * math.comb(4, len(outer))) / (4 * math.comb(4, len(inner)))
        estimate += chance * bits_by_term(model, terms, masks, 1)["rgb"].item()
        rows = itertools.product(sorted(outer), sorted(inner))
        pixel_bits |= {
            (outer, inner, *row): bits / math.log(2) for row, bits in zip(rows, terms[0].nll.sum(1).tolist(), strict=True)
        }

    orders = list(itertools.permutations(range(4)))

    def patch_bits(outer: frozenset, patch: int) -> float:
        steps = ((frozenset(order[k:]), order[k]) for order in orders for k in range(4))
        return sum(pixel_bits[outer, inner, patch, pixel] for inner, pixel in steps) / len(orders)

    brute = sum(patch_bits(frozenset(order[k:]), order[k]) for order in orders for k in range(4)) / len(orders)
    assert estimate == pytest.approx(brute, rel=1e-5)


def test_guiding_bits_count_every_patch_once():
    model, pictures = tiny_model("guided"), normalize(random_levels(2, 8))
    everything = [Mask.of(torch.ones(2, 16)), Mask.of(torch.ones(32, 4))]
    _, terms = model(pictures, torch.zeros(2, dtype=torch.long), masks=everything, train=False, dither=0.0, return_terms=True)
    found = bits_by_term(model, terms, everything, 2)
    for term, rows in zip(terms, (16, 64), strict=True):
        torch.testing.assert_close(found[term.name], term.nll.view(2, rows * 3).sum(1) / math.log(2))


def test_masks_are_a_function_of_the_picture_alone(kind):
    model, pictures = tiny_model(kind), normalize(random_levels(4, 8))
    together = model.draw_masks(Noise.of_pictures(0, range(4), model.noise_sizes))
    alone = model.draw_masks(Noise.of_pictures(0, [2], model.noise_sizes))
    found, single = bits(model, pictures, together), bits(model, pictures[2:3], alone)
    for name in found:
        assert found[name][2].item() == pytest.approx(single[name].item(), rel=1e-5)
