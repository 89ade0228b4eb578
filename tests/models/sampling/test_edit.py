"""Edits: known pixels to the bit, hidden ones given them, for every kind of model and odd masks."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from reference_model import Forced
from torch.utils.flop_counter import FlopCounterMode

from conftest import opinionated, random_levels, tiny_model
from models.fractalgen import PRESETS, build
from models.generator import Mask
from models.likelihood.bits import LN2
from models.noise import Noise
from models.patches import patchify
from models.sampling.canvas import draw_hidden
from models.sampling.edit import box_mask, edit_tiled
from models.sampling.guidance import Guidance
from models.sampling.known import KnownPixels
from models.sampling.prepare import Setup
from util.errors import UserError
from util.pixels import normalize, to_uint8

QUIET = dict(progress_bar=False, output_type="np", seed=3)


def numpy(levels: torch.Tensor) -> np.ndarray:
    return levels.permute(0, 2, 3, 1).numpy()


def box(rows: slice, columns: slice, side: int = 8) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[rows, columns] = True
    return mask


ODD_MASKS = {
    "one pixel": box(slice(3, 4), slice(5, 6)),
    "all but one pixel": ~box(slice(3, 4), slice(5, 6)),
    "a row": box(slice(4, 5), slice(None)),
    "a box across patches": box(slice(1, 6), slice(3, 7)),
    "the last patch": box(slice(6, 8), slice(6, 8)),
    "the first patch": box(slice(0, 2), slice(0, 2)),
    "checkers": np.indices((8, 8)).sum(0) % 2 == 0,
    "scattered": np.random.default_rng(0).random((8, 8)) < 0.3,
}


@pytest.mark.parametrize("mask", ODD_MASKS.values(), ids=ODD_MASKS)
def test_known_pixels_come_back_to_the_bit_and_others_are_drawn(kind, mask):
    model, image = opinionated(tiny_model(kind)), numpy(random_levels(2, 8))
    out = model.edit(image, mask, [1, 2], guidance_scale=2.0, **QUIET)
    assert (out == image)[:, ~mask].all()
    assert (out != image)[:, mask].mean() > 0.8


@pytest.mark.parametrize("name", [name for name in PRESETS if "tiny" in name])
def test_every_small_preset_keeps_known_pixels(name):
    torch.manual_seed(0)
    model = build(name, class_num=3).eval()
    side, levels = model.img_size_list[0], len(model.generators)
    image = numpy(random_levels(1, side))
    mask = np.zeros((side, side), bool)
    mask[side // 4 : side // 2 + 1, 1 : side // 2] = True
    mask[-1, -1] = True
    out = model.edit(image, mask, 1, num_inference_steps=[2] * levels, **QUIET)
    assert (out == image)[:, ~mask].all()
    assert (out != image)[:, mask].mean() > 0.8


def test_all_hidden_is_generate_and_nothing_hidden_comes_back_at_once(kind, monkeypatch):
    model, image = opinionated(tiny_model(kind)), numpy(random_levels(2, 8))
    drawn = model.generate([1, 2], guidance_scale=2.0, **QUIET)
    assert (model.edit(image, np.ones((8, 8)), [1, 2], guidance_scale=2.0, **QUIET) == drawn).all()
    monkeypatch.setattr(type(model), "sampler", None)  # nothing to sample with
    assert (model.edit(image, np.zeros((8, 8)), [1, 2], guidance_scale=2.0, **QUIET) == image).all()


@pytest.mark.parametrize("mask", ODD_MASKS.values(), ids=ODD_MASKS)
def test_hidden_pixels_are_drawn_given_all_known_ones(kind, mask):
    """In one step a level: each distribution is that of the teacher-forced pass whose masks are the hidden patches."""
    model, levels = opinionated(tiny_model(kind)), random_levels(2, 8)
    hidden = torch.from_numpy(mask).expand(2, -1, -1)
    forced = Forced(model, levels)
    with patch.object(KnownPixels, "guide_weights", lambda *_: None):
        conds = [model.fake_latent.repeat(2, 1)] * model.num_conds
        model.sample(
            conds, (1, 1), noise=forced.noise, pick=forced, given=KnownPixels(normalize(levels), hidden)
        )
    inside = patchify(hidden[:, None].float(), 2).bool()  # (2, 16, 4)
    top, below = (type(generator).__name__ for generator in model.generators)
    first = Mask.of(inside.any(-1)) if top == "MAR" else None
    rows = inside.flatten(0, 1)[first.rows] if first else inside.flatten(0, 1)
    second = Mask.of(rows) if below == "MAR" else None
    _, terms = model(
        normalize(levels), torch.zeros(2, dtype=torch.long), masks=[first, second], train=False, dither=0.0, as_drawn=True,
        return_terms=True,
    )  # fmt: skip
    found = {term.name: term.nll.double() for term in terms}
    rgb = found["rgb"] if second else found["rgb"][rows.flatten()]
    expected = (rgb.sum() + (found["guiding1"].sum() if "guiding1" in found else 0)).item() / LN2
    assert forced.bits == pytest.approx(expected, rel=1e-5)


def test_known_pixels_weigh_on_the_guiding_pixel():
    """A patch of which all but one pixel is known: its mean can hardly differ from theirs."""
    hidden = torch.zeros(1, 2, 2, dtype=torch.bool)
    hidden[0, 0, 0] = True
    levels = torch.full((1, 3, 2, 2), 200, dtype=torch.uint8)
    given = KnownPixels(normalize(levels), hidden)
    weights = given.guide_weights(0, torch.zeros(1, 0, dtype=torch.long))
    possible = weights.isfinite().nonzero()[:, 1]
    assert (possible.min().item(), possible.max().item()) == (150, 214)
    assert weights.argmax().item() == 200
    nothing_known = KnownPixels(normalize(levels), torch.ones_like(hidden))
    assert (nothing_known.guide_weights(0, torch.zeros(1, 0, dtype=torch.long)) == 0).all()


def test_the_sampler_draws_guiding_pixels_given_what_is_known():
    model, hidden, met = opinionated(tiny_model("guided")), torch.zeros(1, 8, 8, dtype=torch.bool), []
    hidden[0, 0, 0] = True

    def pick(probs, uniforms):
        met.append(probs)
        return probs.argmax(-1)

    levels = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    conds = [model.fake_latent] * model.num_conds
    model.sample(conds, (1, 1), pick=pick, given=KnownPixels(normalize(levels), hidden))
    assert len(met) == 6  # R, G, B of the guiding pixel and of the hidden one
    for probs in met[:3]:
        assert probs[0, 150:215].sum().item() == pytest.approx(1)


def test_images_of_other_masks_are_each_as_if_alone(kind):
    model, image = opinionated(tiny_model(kind)), numpy(random_levels(4, 8))
    masks = np.stack(
        [ODD_MASKS["one pixel"], np.zeros((8, 8), bool), ODD_MASKS["scattered"], np.ones((8, 8), bool)]
    )
    together = model.edit(image, masks, [0, 1, 2, 3], guidance_scale=2.0, chunk=3, **QUIET)
    for i in range(4):
        alone = model.edit(image[i], masks[i], i, guidance_scale=2.0, indices=[i], **QUIET)
        assert (alone[0] == together[i]).all()


def test_several_results_of_each_image_differ_and_follow_one_another():
    model, image, mask = opinionated(tiny_model()), numpy(random_levels(2, 8)), ODD_MASKS["scattered"]
    out = model.edit(image, mask, [0, 3], num_results=2, guidance_scale=1.0, **QUIET)
    assert out.shape == (4, 8, 8, 3)
    for i, one in enumerate(out):
        assert (one == image[i // 2])[~mask].all()
    assert (out[0] != out[1]).any()
    assert (model.edit(image[1], mask, 3, indices=[3], guidance_scale=1.0, **QUIET)[0] == out[3]).all()


def test_any_kind_of_input_gives_the_same():
    model, levels, mask = opinionated(tiny_model()), random_levels(1, 8), ODD_MASKS["scattered"]
    expected = model.edit(numpy(levels), mask, 1, **QUIET)
    images = [
        Image.fromarray(numpy(levels)[0]),
        levels[0],
        levels.double() / 255,
        numpy(levels)[0] / 255.0,
        levels.int(),
    ]
    masks = [
        Image.fromarray(mask),
        Image.fromarray(np.uint8(mask) * 255),
        torch.from_numpy(mask)[None, None],
        np.float32(mask),
    ]
    for image in images:
        assert (model.edit(image, mask, 1, **QUIET) == expected).all()
    for other in masks:
        assert (model.edit(levels, other, 1, **QUIET) == expected).all()


def test_the_canvas_shows_all_images_and_their_known_pixels_from_the_first_step(kind):
    model, image, seen = opinionated(tiny_model(kind)), random_levels(3, 8), []
    masks = np.stack([ODD_MASKS["scattered"], np.zeros((8, 8), bool), ODD_MASKS["one pixel"]])
    call = lambda step, steps, canvas: seen.append((step, steps, numpy(to_uint8(canvas))))  # noqa: E731
    out = model.edit(image, masks, [0, 1, 2], callback_on_step_end=call, **QUIET)
    assert [step for step, *_ in seen] == list(range(seen[0][1]))
    for _, _, canvas in seen:
        assert (canvas == numpy(image))[~masks].all()
    assert (seen[-1][2] == out).all()


def test_half_precision_keeps_known_pixels_too():
    model, levels, mask = (
        opinionated(tiny_model("guided")).bfloat16(),
        random_levels(2, 8),
        ODD_MASKS["scattered"],
    )
    assert (model.edit(levels, mask, [0, 1], **QUIET) == numpy(levels))[:, ~mask].all()


def test_scale_and_temperature_by_level():
    model, levels, mask = opinionated(tiny_model("guided")), random_levels(1, 8), np.ones((8, 8))
    same = model.edit(levels, mask, 1, guidance_scale=[2.0, 2.0], temperature=[1.1, 1.1], **QUIET)
    assert (same == model.edit(levels, mask, 1, guidance_scale=2.0, temperature=1.1, **QUIET)).all()
    others = [dict(guidance_scale=[1.0, 2.0]), dict(guidance_scale=[2.0, 1.0]), dict(temperature=[5.0, 1.1])]
    drawn = [
        model.edit(levels, mask, 1, **{"guidance_scale": 2.0, "temperature": 1.1, **other}, **QUIET)
        for other in others
    ]
    assert all((one != same).any() for one in drawn)
    with pytest.raises(
        ValueError,
        match=r"guidance scale \[1.0\] must be one number, or 2, one for each level above the pixel",
    ):
        model.edit(levels, mask, 1, guidance_scale=[1.0], **QUIET)


@pytest.mark.parametrize("name", ["fractalmar_tiny_in32", "fractalmar_tiny_in64"])
def test_operations_follow_the_hidden_share(name):
    model = build(name, class_num=3).eval()
    side = model.img_size_list[0]
    conds, steps = [model.fake_latent.detach()] * model.num_conds, [8] + [2] * (len(model.generators) - 1)
    counts = []
    for mask in (torch.ones(side, side, dtype=torch.bool), box_mask(side, (0, 0, side // 2, side // 2))):
        given = KnownPixels(normalize(random_levels(1, side)), mask[None])
        with (
            torch.no_grad(),
            patch("models.sampling.prepare.packed_rows", lambda dtype: range(0)),
        ):  # oneDNN's are not counted
            sampler = model.sampler(Setup(torch.float32))
            with FlopCounterMode(display=False) as counter:
                draw_hidden(
                    sampler, conds, Guidance(), Noise.of_images(0, [0], model.noise_sizes), steps, given
                )
        counts.append(counter.get_total_flops())
    assert counts[1] < 0.3 * counts[0]


def test_outpainting_uncropping_and_another_class_are_edits():
    model, levels = opinionated(tiny_model()), random_levels(1, 8)
    image = numpy(levels)
    inside = box_mask(8, (2, 1, 5, 4)).numpy()
    assert inside.sum() == 20
    assert inside[1:5, 2:7].all()
    out = model.outpaint(levels, (2, 1, 5, 4), 1, **QUIET)
    assert (out == image)[:, inside].all()
    assert (out == model.edit(levels, ~inside, 1, **QUIET)).all()
    assert (
        model.edit_class(levels, (2, 1, 5, 4), 3, **QUIET) == model.edit(levels, inside, 3, **QUIET)
    ).all()
    small = levels[:, :, 1:5, 2:7]
    placed = model.uncrop(small, (2, 1), 1, **QUIET)
    assert (placed[:, 1:5, 2:7] == numpy(small)).all()
    with pytest.raises(
        UserError, match=r"box 4 1 5 4 \(x, y, width, height\) is not within the 8 x 8 pixels"
    ):
        model.uncrop(small, (4, 1), 1, **QUIET)


def test_a_larger_image_is_edited_in_windows():
    model, levels = opinionated(tiny_model()), random_levels(1, 24)[:, :, :20]
    image, mask = numpy(levels)[0], np.zeros((20, 24), bool)
    mask[2:19, 3:17], mask[0, 23] = True, True
    out = edit_tiled(model, levels, mask, 1, num_results=2, seed=0)
    assert out.shape == (2, 20, 24, 3)
    assert (out == image)[:, ~mask].all()
    assert (out != image)[:, mask].mean() > 0.8
    assert (out[0] != out[1]).any()


def test_windows_take_one_image_of_the_models_size_or_more():
    model, levels, mask = tiny_model(), random_levels(2, 24), np.ones((2, 24, 24))
    with pytest.raises(UserError, match="image of 24 x 7 pixels is smaller than the model's 8 x 8"):
        edit_tiled(model, levels[:1, :, :7], mask[0, :7])
    for images, masks in ((levels, mask[0]), (levels[0], mask)):
        with pytest.raises(UserError, match=r"[12] images and [12] masks; give one of each"):
            edit_tiled(model, images, masks)
    with pytest.raises(UserError, match="num_results 0 must be at least 1"):
        edit_tiled(model, levels[0], mask[0], num_results=0)
    with pytest.raises(TypeError, match="output_type"):
        edit_tiled(model, levels[0], mask[0], output_type="pil")


def test_a_model_in_training_is_edited_without_dropout_and_stays_in_training():
    model, levels, mask = opinionated(tiny_model()), random_levels(1, 8), ODD_MASKS["scattered"]
    expected = model.edit(levels, mask, 1, **QUIET)
    assert (model.train().edit(levels, mask, 1, **QUIET) == expected).all()
    assert all(module.training for module in model.modules())


def test_a_model_without_classes_is_edited():
    model, levels, mask = tiny_model(class_num=0), random_levels(2, 8), ODD_MASKS["scattered"]
    assert (model.edit(levels, mask, num_results=2, **QUIET)[::2] == numpy(levels))[:, ~mask].all()
    with pytest.raises(ValueError, match="the model has no classes: leave class_labels out"):
        model.edit(levels, mask, 0, **QUIET)


def test_refresh_edits_too():
    model, levels, mask = (
        opinionated(tiny_model("guided")),
        random_levels(1, 8),
        ODD_MASKS["a box across patches"],
    )
    out = model.edit(levels, mask, 1, refresh=2, **QUIET)
    assert (out == numpy(levels))[:, ~mask].all()
    assert (out != model.edit(levels, mask, 1, **QUIET)).any()  # approximate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.zeros(3, 9, 8, dtype=torch.uint8), np.ones((8, 8))),
            "image of 8 x 9 pixels for a model of 8 x 8; crop it",
        ),
        ((random_levels(1, 8), np.ones((8, 9))), "mask of 9 x 8 pixels for an image of 8 x 8"),
        ((random_levels(3, 8), np.ones((2, 8, 8))), "3 images and 2 masks; give one of either, or as many"),
        (
            (random_levels(3, 8), np.ones((8, 8)), [0, 1]),
            "2 class_labels for 3 images; give one, or one each",
        ),
        (
            (random_levels(1, 8), np.ones((8, 8)), 4),
            "class label 4 is out of range; the model has classes 0 to 3",
        ),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().edit(*arguments, **QUIET)


def test_no_result_and_unknown_options_are_errors():
    model = tiny_model()
    with pytest.raises(ValueError, match="num_results 0 must be at least 1"):
        model.edit(random_levels(1, 8), np.ones((8, 8)), num_results=0, **QUIET)
    with pytest.raises(TypeError, match="guidance"):
        model.edit(random_levels(1, 8), np.ones((8, 8)), guidance=3)
