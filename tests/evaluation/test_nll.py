"""compute_nll: the same numbers whatever the batch, of each image once, and none that is not a number."""

import itertools
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from conftest import opinionated, random_values, swayed, tiny_model
from engine_fractalgen import compute_nll
from evaluation.nll import Measured, _summary
from models.generator import Mask
from models.likelihood.bits import bits_by_term, draw_steps, trace_rows
from util.dist import World
from util.errors import UserError
from util.pixels import RGB

CPU = torch.device("cpu")
LEVELS, LABELS = random_values(7, 8), torch.arange(7) % 4


def nll(model, batch_size=7, passes=2, seed=0, images=range(7), values=LEVELS, **how) -> dict:
    """compute_nll of the images of these numbers; further numbers count from the first again."""
    numbers = torch.tensor(list(images))
    chosen = values[numbers % len(values)], LABELS[numbers % len(values)], numbers
    loader = DataLoader(TensorDataset(*chosen), batch_size)
    how = dict(autocast=nullcontext(), world=World(), progress_bar=False) | how
    return compute_nll(model, loader, passes=passes, seed=seed, device=CPU, **how)


def figures(scores, prefix="") -> dict[str, float]:
    found, numbers = (
        {},
        {
            name: -1.0 if value is None else value
            for name, value in scores.items()
            if not isinstance(value, str)
        },
    )
    for name, value in numbers.items():
        found |= figures(value, f"{name}/") if isinstance(value, dict) else {prefix + name: value}
    return found


@pytest.mark.parametrize("steps", [None, (5, 3)])
@pytest.mark.parametrize("conditional", [False, True])
def test_no_number_depends_on_the_batch_or_on_chance(kind, steps, conditional):
    model, how = opinionated(tiny_model(kind)).train(), dict(num_iter_list=steps, conditional=conditional)
    whole, parts = nll(model, 7, **how), nll(model, 3, **how)
    assert model.training
    assert figures(whole) == pytest.approx(figures(parts), rel=1e-5)  # float32
    assert nll(model, 7, **how) == whole
    again = nll(model, 7, seed=1, **how)["bits_per_dim"]
    assert (again == whole["bits_per_dim"]) == (kind == "ar")


def test_parts_sum_to_the_whole(kind):
    scores = nll(tiny_model(kind))
    assert scores["num_images"] == 7
    assert 7.9 < scores["bits_per_dim"] < 14  # noise, and an untrained model
    assert 0 < scores["standard_error"] < 1
    heads = ["guiding1", "rgb"] if kind == "guided" else ["rgb"]
    assert list(scores["by_channel"]) == heads
    assert sum(scores[f"bits_per_dim_{name}"] for name in heads) == pytest.approx(scores["bits_per_dim"])
    for name in heads:
        assert sum(scores["by_channel"][name].values()) == pytest.approx(scores[f"bits_per_dim_{name}"])
    assert list(scores["by_level"]) == ["level0", "level1"]
    assert list(scores["by_level"]["level1"]) == [
        "known 0-25%",
        "known 25-50%",
        "known 50-75%",
        "known 75-100%",
    ]


def test_quarters_of_an_ar_level_average_to_the_whole():
    scores = nll(tiny_model("ar"))
    for quarters in scores["by_level"].values():
        assert sum(quarters.values()) / 4 == pytest.approx(scores["bits_per_dim"])


def test_without_random_masks_one_pass_is_enough():
    scores = nll(tiny_model("ar"), passes=5)
    assert scores["passes"] == 1
    assert "standard_error_of_passes" not in scores
    assert scores["published_nll"] == pytest.approx(scores["bits_per_dim"], rel=1e-6)


def test_a_guided_model_is_told_less_than_in_the_published_loss():
    """There guiding losses are added as if a patch had as many dimensions as the image, and means are seen unrounded."""
    model = swayed(tiny_model("guided"))
    scores = nll(model, passes=1)
    assert scores["published_nll"] > scores["bits_per_dim"] + 1
    assert 0 < scores["bits_per_dim_guiding1"] < scores["bits_per_dim_rgb"]


def test_published_nll_is_the_published_loss_stratified_over_all_numbers_of_masked_patches(monkeypatch):
    """The published evaluation averages passes of which each masks as many patches in all images of a level.

    A model of two MAR levels of four patches, each mask with the chance that the evaluation gives it.
    """
    model = swayed(tiny_model("guided", img_size_list=[4, 2, 1]))
    image, label = RGB.normalize(random_values(1, 4, seed=3)), torch.zeros(1, dtype=torch.long)
    masks = {
        m: [[i in c for i in range(4)] for c in itertools.combinations(range(4), m)] for m in range(1, 5)
    }
    stratified = 0.0
    for outer, inner in itertools.product(masks, masks):
        for one, other in itertools.product(masks[outer], masks[inner]):
            pair = [Mask.of(torch.tensor([one])), Mask.of(torch.tensor([other] * outer))]
            loss = model(image, label, masks=pair, train=False, dither=0.0).item() / math.log(2)
            stratified += loss / (16 * len(masks[outer]) * len(masks[inner]))

    equally_likely = [mask for of_count in masks.values() for mask in of_count * (12 // len(of_count))]
    pairs = list(itertools.product(equally_likely, equally_likely))  # 2304
    outer = torch.tensor([one for one, _ in pairs])
    inner = torch.tensor([other for one, other in pairs for _ in range(sum(one))])
    monkeypatch.setattr(model, "draw_masks", lambda noise: [Mask.of(outer), Mask.of(inner)])
    scores = nll(model, len(pairs), passes=1, images=range(len(pairs)), values=random_values(1, 4, seed=3))
    assert scores["published_nll"] == pytest.approx(stratified, rel=1e-5)
    assert scores["bits_per_dim"] < stratified - 0.1


def test_without_guiding_pixels_the_published_nll_is_the_bound():
    scores = nll(opinionated(tiny_model("mar")))
    assert scores["published_nll"] == pytest.approx(scores["bits_per_dim"], rel=1e-9)


@pytest.mark.parametrize("kind", ["ar", "guided"])
def test_labels_are_given_or_hidden(kind):
    model, other = opinionated(tiny_model(kind)), opinionated(tiny_model(kind))
    with torch.no_grad():
        other.class_emb.weight.copy_(other.fake_latent.expand(4, -1))
    unconditional, conditional = nll(model), nll(model, conditional=True)
    assert unconditional["bits_per_dim"] == pytest.approx(
        nll(other, conditional=True)["bits_per_dim"], rel=1e-5
    )
    assert abs(unconditional["bits_per_dim"] - conditional["bits_per_dim"]) > 1e-3
    assert "published_nll" not in conditional  # which is unconditional
    with pytest.raises(ValueError, match="class_num 0"):
        nll(tiny_model(kind, class_num=0), conditional=True)


def test_steps_are_followed_for_each_drawn_order():
    model, steps = opinionated(tiny_model("guided")), (6, 2)
    scores, paid = nll(model, passes=2, num_iter_list=steps), 0.0
    for first in (0, 7):  # orders of a pass
        masks = draw_steps(model, model.noise(0, range(first, first + 7)), steps)
        with torch.no_grad():
            _, terms = model(
                RGB.normalize(LEVELS),
                LABELS,
                masks=masks,
                train=False,
                dither=0.0,
                round_guiding_pixel=True,
                return_terms=True,
            )
        paid += sum(bits.sum().item() for bits in bits_by_term(terms, trace_rows(model, masks, 7)).values())
    assert scores["bits_per_dim"] == pytest.approx(paid / (2 * 7 * 3 * 64), rel=1e-6)
    assert "published_nll" not in scores


def test_means_and_standard_errors():
    """Three images, two passes, one dimension, out of order: bits 1 and 3, 5 and 5, 6 and 10."""
    bits = [(2, 6.0), (0, 1.0), (1, 5.0), (2, 10.0), (0, 3.0), (1, 5.0)]
    parts = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    measured = [
        Measured(torch.tensor([index]), {"rgb": value * parts[None]},
                 {"level0": torch.tensor([[[value, 2.0], [value, 1.0], [0, 0], [0, 0]]])}, torch.tensor([value + index]))
        for index, value in bits
    ]  # fmt: skip
    scores = _summary(measured, 2, SimpleNamespace(num_dims=1, alphabet=RGB))
    assert scores["bits_per_dim"] == 5  # the mean of 2, 5 and 8
    assert scores["standard_error"] == pytest.approx(3 / math.sqrt(3))
    assert scores["standard_error_of_passes"] == pytest.approx(math.sqrt((2 + 0 + 8) / 3 / 2 / 3))
    assert scores["by_channel"]["rgb"] == {"r": 2.5, "g": 1.25, "b": 1.25}
    assert list(scores["by_level"]["level0"].values()) == [2.5, 5, None, None]
    assert scores["published_nll"] == 36 / 6


@pytest.mark.parametrize(("value", "said"), [(math.nan, "is nan bits"), (math.inf, "is (nan|inf) bits")])
def test_bits_that_are_no_number_are_an_error(value, said):
    model = tiny_model("guided")
    with torch.no_grad():
        model.class_emb.weight[2] = value
    assert nll(model, images=[0, 1, 3], conditional=True)["num_images"] == 3
    with pytest.raises(
        UserError, match=rf"{said} at the guiding1 head for 2 of 7 validation images, the first is number 2"
    ):
        nll(model, conditional=True)
