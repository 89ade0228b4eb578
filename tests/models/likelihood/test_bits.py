"""Bits of each image, against the samplers, and against brute force over every mask and order of models small enough."""

import itertools
import math

import numpy as np
import pytest
import torch
from reference_model import Forced, ReferenceSampler

from conftest import opinionated, random_values, swayed, tiny_model
from models.fractalgen import FractalGen
from models.generator import Mask, Steps
from models.likelihood.bits import (
    bits_by_level,
    bits_by_term,
    draw_steps,
    meaning,
    published_losses,
    trace_rows,
)
from models.mar import cosine_plan
from util.pixels import RGB

PIXELS = dict(img_size_list=[2, 1], embed_dim_list=[16, 16], num_blocks_list=[1, 1], num_heads_list=[2, 2])
SUBSETS = [frozenset(c) for n in range(1, 5) for c in itertools.combinations(range(4), n)]
ORDERS = list(itertools.permutations(range(4)))


def measure(model, images, masks, round_guiding_pixel=True):
    labels = torch.zeros(len(images), dtype=torch.long)
    _, terms = model(
        images,
        labels,
        masks=masks,
        train=False,
        dither=0.0,
        round_guiding_pixel=round_guiding_pixel,
        return_terms=True,
    )
    return terms, trace_rows(model, masks, len(images))


def bits(model, images, masks, round_guiding_pixel=True) -> dict[str, torch.Tensor]:
    """(B,) by term."""
    return {
        name: value.sum(1)
        for name, value in bits_by_term(*measure(model, images, masks, round_guiding_pixel)).items()
    }


def four_pixels(**changes) -> FractalGen:
    """One MAR level of 2 x 2 patches of a pixel."""
    torch.manual_seed(0)
    return opinionated(
        FractalGen(**PIXELS, generator_type_list=["mar", "ar"], class_num=2, num_conds=1, **changes)
    ).eval()


def hide(hidden, rows: int = 1) -> Mask:
    return Mask.of(torch.tensor([[i in hidden for i in range(4)]] * rows))


def no_ties(levels):
    """Means of 2 x 2 levels that lie a quarter above a whole one: far from a tie, and not what is drawn."""
    levels = levels - levels % 4
    levels[..., ::2, ::2] += 1
    return levels


@pytest.mark.parametrize("steps", [(5, 3), (16, 4), (1, 1)])
def test_bits_in_steps_are_what_the_sampler_pays_for_the_image(kind, steps):
    """The fast sampler and the reference implementation, unguided and unfiltered, are made to draw the images: exact for the drawn orders."""
    model, levels = swayed(tiny_model(kind)), no_ties(random_values(2, 8))
    slow, fast = Forced(model, levels), Forced(model, levels)
    drawn = ReferenceSampler(model, steps, 1.0, pick=slow).sample(None, slow.noise)
    conds = [model.fake_latent.repeat(2, 1)] * model.num_conds
    assert torch.equal(RGB.to_values(drawn), levels.long())
    assert torch.equal(RGB.to_values(model.sample(conds, steps, noise=fast.noise, pick=fast)), levels.long())
    found = bits(model, RGB.normalize(levels), draw_steps(model, slow.noise, steps))
    assert sum(value.sum() for value in found.values()).item() == pytest.approx(slow.bits, rel=1e-5)
    assert fast.bits == pytest.approx(slow.bits, rel=1e-5)
    assert set(found) == ({"guiding1", "rgb"} if kind == "guided" else {"rgb"})


def test_an_image_is_predicted_from_the_guiding_pixel_that_is_paid_for():
    model, images = swayed(tiny_model("guided")), RGB.normalize(no_ties(random_values(2, 8)))
    masks = model.draw_masks(model.noise(0, range(2)))
    drawn, exact = (bits(model, images, masks, round_guiding_pixel) for round_guiding_pixel in (True, False))
    assert torch.equal(drawn["guiding1"], exact["guiding1"])
    assert (drawn["rgb"] - exact["rgb"]).abs().min() > 0.02


def test_ar_bits_are_the_loss_of_each_image():
    model, images = tiny_model("ar"), RGB.normalize(random_values(3, 8))
    found = bits(model, images, [None, None])["rgb"]
    for i in range(3):
        loss = model(images[i : i + 1], torch.zeros(1, dtype=torch.long))
        assert found[i].item() == pytest.approx(loss.item() * 3 * 64 / math.log(2), rel=1e-5)


def test_bits_by_channel_are_the_heads_own():
    model, images = tiny_model("ar"), RGB.normalize(random_values(2, 8))
    terms, rows = measure(model, images, [None, None])
    expected = terms[0].nll.view(2, 64, 3).sum(1).double() / math.log(2)
    torch.testing.assert_close(bits_by_term(terms, rows)["rgb"], expected)


def test_bits_in_parallel_steps_equal_brute_force_over_all_orders():
    """Four pixels in two steps: of an order's patches, the first ones given nothing, the others given those."""
    model, images = four_pixels(), RGB.normalize(random_values(1, 2))
    plan = tuple((begin, end) for begin, end, _ in cosine_plan(4, 2))
    assert len(plan) == 2

    def brute(order) -> float:
        paid = 0.0
        for begin, end in plan:
            mask = hide(order[begin:])
            (term,), _ = measure(model, images, [mask])
            nats = dict(zip(mask.rows.tolist(), term.nll.sum(1).tolist(), strict=True))
            paid += sum(nats[patch] for patch in order[begin:end]) / math.log(2)
        return paid

    found = [bits(model, images, [Steps(torch.tensor([order]), plan)])["rgb"].item() for order in ORDERS]
    assert found == pytest.approx([brute(order) for order in ORDERS], rel=1e-5)
    assert max(found) - min(found) > 0.1


def test_guided_estimate_averages_to_the_samplers_bits_over_all_orders():
    """Guiding pixels included, and the orders those of the only MAR level, whose four patches share them here."""
    sizes = dict(
        img_size_list=[4, 2, 1], embed_dim_list=[16] * 3, num_blocks_list=[1] * 3, num_heads_list=[2] * 3
    )
    kinds = dict(generator_type_list=["ar", "mar", "ar"], num_conds=1, guiding_pixel=True, class_num=2)
    model, levels = swayed(FractalGen(**sizes, **kinds)).eval(), no_ties(random_values(1, 4))
    estimate = brute = 0.0
    for hidden in SUBSETS:
        found = bits(model, RGB.normalize(levels), [None, hide(hidden, 4)])
        estimate += sum(found.values()).item() / (4 * math.comb(4, len(hidden)))
    for order in ORDERS:
        forced = Forced(model, levels)
        places = torch.tensor(order).argsort().view(2, 2) / 4
        forced.noise.maps[2][:, :1] = places.repeat(2, 2)
        model.sample([model.fake_latent], (4, 4), noise=forced.noise, pick=forced)
        brute += forced.bits / len(ORDERS)
    assert estimate == pytest.approx(brute, rel=1e-5)


def test_bits_by_level_are_those_of_each_place_in_the_order():
    """Quarter k of four patches is the k-th decided: the mean over orders of its bits, from all masks and from all orders."""
    model, images = four_pixels(), RGB.normalize(random_values(1, 2))
    estimated, followed = torch.zeros(4), torch.zeros(4)
    for hidden in SUBSETS:
        masks = [hide(hidden)]
        bits_and_size = bits_by_level(model, *measure(model, images, masks))["level0"][0]
        quarter = 4 - len(hidden)
        assert bits_and_size[:, 1].tolist() == [12 * (q == quarter) for q in range(4)]
        estimated += bits_and_size[:, 0] / bits_and_size[quarter, 1] / math.comb(4, len(hidden))
    for order in ORDERS:
        masks = [Steps(torch.tensor([order]), ((0, 1), (1, 2), (2, 3), (3, 4)))]
        bits_and_size = bits_by_level(model, *measure(model, images, masks))["level0"][0]
        followed += bits_and_size[:, 0] / bits_and_size[:, 1] / len(ORDERS)
    torch.testing.assert_close(estimated, followed, rtol=1e-5, atol=1e-5)
    assert followed.max() - followed.min() > 0.01


@pytest.mark.parametrize("in_steps", [True, False])
def test_every_level_accounts_for_all_that_is_paid_below_it(kind, in_steps):
    model, images = opinionated(tiny_model(kind)), RGB.normalize(random_values(3, 8))
    noise = model.noise(0, range(3))
    measured = measure(
        model, images, draw_steps(model, noise, (6, 4)) if in_steps else model.draw_masks(noise)
    )
    by_term, by_level = bits_by_term(*measured), bits_by_level(model, *measured)
    torch.testing.assert_close(by_level["level0"][..., 0].sum(1), sum(by_term.values()).sum(1))
    torch.testing.assert_close(by_level["level1"][..., 0].sum(1), by_term["rgb"].sum(1))
    for sums in by_level.values():
        assert sums[..., 1].sum(1).tolist() == pytest.approx([3 * 64] * 3)


def as_many_for_all(model, counts: tuple[int, int], n: int) -> list[Mask]:
    """Masks of `counts` patches in every image of each level, as one pass of the published evaluation has them."""
    noise, masks = model.noise(1, range(n)), []
    for count in counts:
        uniforms = noise.order_uniforms
        masks.append(Mask.of_counts(np.full(len(uniforms), count), uniforms))
        noise = noise.rows(masks[-1].rows)
    return masks


@pytest.mark.parametrize("counts", [(16, 4), (5, 3), (1, 1)])
def test_published_losses_of_as_many_masked_patches_are_the_published_loss(counts):
    model, images = opinionated(tiny_model("guided")), RGB.normalize(random_values(3, 8))
    masks = as_many_for_all(model, counts, 3)
    loss = model(images, torch.zeros(3, dtype=torch.long), masks=masks, dither=0.0)
    found = published_losses(*measure(model, images, masks, round_guiding_pixel=False))
    assert found.mean().item() * math.log(2) == pytest.approx(loss.item(), rel=1e-5)


def test_published_losses_do_not_depend_on_the_batch():
    model, images = opinionated(tiny_model("guided")), RGB.normalize(random_values(3, 8))

    def losses(numbers) -> torch.Tensor:
        masks = model.draw_masks(model.noise(0, numbers))
        return published_losses(*measure(model, images[numbers], masks, round_guiding_pixel=False))

    torch.testing.assert_close(
        torch.cat([losses([i]) for i in range(3)]), losses([0, 1, 2]), rtol=1e-5, atol=0
    )


def test_what_is_exact_and_what_a_bound_is_said():
    assert meaning(tiny_model("ar"), True, False) == "the negative log-likelihood, exactly"
    assert "bound on the negative log-likelihood: the mean over all orders" in meaning(
        tiny_model("mar over ar"), False, False
    )
    assert "exactly for each drawn order, guiding pixels' bits" in meaning(tiny_model("guided"), True, True)


def test_mar_estimate_averages_to_the_mean_over_all_orders():
    """Four pixels, one level: the expectation over (count uniform, subset uniform) is the mean NLL over all 24 orders."""
    model, images = four_pixels(), RGB.normalize(random_values(1, 2))
    estimate = sum(bits(model, images, [hide(s)])["rgb"].item() / math.comb(4, len(s)) for s in SUBSETS) / 4

    def step_bits(known: tuple[int, ...], pixel: int) -> float:
        """-log2 p(pixel | known), from the mask that hides all that is not known."""
        mask = hide(set(range(4)) - set(known))
        (term,), _ = measure(model, images, [mask])
        return term.nll[mask.rows.tolist().index(pixel)].sum().item() / math.log(2)

    brute = sum(step_bits(order[:k], order[k]) for order in ORDERS for k in range(4)) / len(ORDERS)
    assert estimate == pytest.approx(brute, rel=1e-5)


def test_two_mar_levels_average_to_the_mean_over_all_orders_of_both():
    """Brute force over the orders of level 0's patches and, in each patch, of its pixels."""
    torch.manual_seed(0)
    sizes = dict(
        img_size_list=[4, 2, 1], embed_dim_list=[16] * 3, num_blocks_list=[1] * 3, num_heads_list=[2] * 3
    )
    model = FractalGen(**sizes, generator_type_list=["mar", "mar", "ar"], class_num=2, num_conds=5).eval()
    images = RGB.normalize(random_values(1, 4))
    estimate, pixel_bits = 0.0, {}
    for outer, inner in itertools.product(SUBSETS, SUBSETS):
        masks = [hide(outer, 1), hide(inner, len(outer))]
        terms, rows_of = measure(model, images, masks)
        chance = 1 / (4 * math.comb(4, len(outer))) / (4 * math.comb(4, len(inner)))
        estimate += chance * bits_by_term(terms, rows_of)["rgb"].sum().item()
        rows = itertools.product(sorted(outer), sorted(inner))
        pixel_bits |= {
            (outer, inner, *row): bits / math.log(2)
            for row, bits in zip(rows, terms[0].nll.sum(1).tolist(), strict=True)
        }

    def patch_bits(outer: frozenset, patch: int) -> float:
        steps = ((frozenset(order[k:]), order[k]) for order in ORDERS for k in range(4))
        return sum(pixel_bits[outer, inner, patch, pixel] for inner, pixel in steps) / len(ORDERS)

    brute = sum(patch_bits(frozenset(order[k:]), order[k]) for order in ORDERS for k in range(4)) / len(
        ORDERS
    )
    assert estimate == pytest.approx(brute, rel=1e-5)


def test_guiding_bits_count_every_patch_once():
    model, images = tiny_model("guided"), RGB.normalize(random_values(2, 8))
    everything = [Mask.of(torch.ones(2, 16)), Mask.of(torch.ones(32, 4))]
    terms, rows_of = measure(model, images, everything)
    found = bits_by_term(terms, rows_of)
    for term, rows in zip(terms, (16, 64), strict=True):
        torch.testing.assert_close(found[term.name], term.nll.double().view(2, rows, 3).sum(1) / math.log(2))


def test_masks_are_a_function_of_the_image_alone(kind):
    model, images = tiny_model(kind), RGB.normalize(random_values(4, 8))
    together = model.draw_masks(model.noise(0, range(4)))
    alone = model.draw_masks(model.noise(0, [2]))
    found, single = bits(model, images, together), bits(model, images[2:3], alone)
    for name in found:
        assert found[name][2].item() == pytest.approx(single[name].item(), rel=1e-5)
