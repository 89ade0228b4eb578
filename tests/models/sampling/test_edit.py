"""Edits keep known pixels exactly, and draw hidden pixels conditionally on them."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from reference_model import Forced
from torch.utils.flop_counter import FlopCounterMode

from conftest import opinionated, random_values, tiny_model
from models.fractalgen import PRESETS, build
from models.generator import Mask
from models.likelihood.bits import LN2
from models.patches import patchify
from models.sampling.canvas import Batch
from models.sampling.edit import box_mask
from models.sampling.generate import build_sampler
from models.sampling.guidance import Guidance
from models.sampling.known import KnownPixels
from models.sampling.prepare import Setup
from util.errors import UserError
from util.pixels import RGB

QUIET = dict(progress_bar=False, output_type="np", seed=3)


def numpy(values: torch.Tensor) -> np.ndarray:
    return values.permute(0, 2, 3, 1).numpy()


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
    model, image = opinionated(tiny_model(kind)), numpy(random_values(2, 8))
    out = model.edit(image, mask, [1, 2], guidance_scale=2.0, **QUIET)
    assert (out == image)[:, ~mask].all()
    assert (out != image)[:, mask].mean() > 0.8


@pytest.mark.parametrize("name", [name for name in PRESETS if "tiny" in name])
def test_every_small_preset_keeps_known_pixels(name):
    torch.manual_seed(0)
    model = build(name, class_num=3).eval()
    shape = model.image_shape
    image = np.random.default_rng(0).integers(256, size=(1, *shape, model.alphabet.channels))
    mask = np.zeros(shape, bool)
    mask[tuple(slice(side // 4, side // 2 + 1) for side in shape)] = True
    mask[(-1,) * len(shape)] = True
    out = model.edit(image, mask, 1, num_inference_steps=[2] * len(model.generators), **QUIET)
    assert (out == image)[:, ~mask].all()
    assert (out != image)[:, mask].mean() > 0.8


def test_all_hidden_is_generate_and_nothing_hidden_comes_back_at_once(kind, monkeypatch):
    model, image = opinionated(tiny_model(kind)), numpy(random_values(2, 8))
    drawn = model.generate([1, 2], guidance_scale=2.0, **QUIET)
    assert (model.edit(image, np.ones((8, 8)), [1, 2], guidance_scale=2.0, **QUIET) == drawn).all()
    monkeypatch.setattr("models.sampling.generate.build_sampler", None)  # any attempt to sample fails
    assert (model.edit(image, np.zeros((8, 8)), [1, 2], guidance_scale=2.0, **QUIET) == image).all()


@pytest.mark.parametrize("mask", ODD_MASKS.values(), ids=ODD_MASKS)
def test_hidden_pixels_are_drawn_conditionally_on_all_known_ones(kind, mask):
    """With one step per level, the bits are those of a forward pass that masks the hidden patches."""
    model, values = opinionated(tiny_model(kind)), random_values(2, 8)
    hidden = torch.from_numpy(mask).expand(2, -1, -1)
    forced = Forced(model, values)
    with patch.object(KnownPixels, "guiding_weights", lambda *_: None):
        conds = [model.fake_latent.repeat(2, 1)] * model.num_conds
        model.sample(
            conds,
            (1, 1),
            noise=forced.noise,
            pick=forced,
            known=KnownPixels(RGB.normalize(values), hidden, RGB),
        )
    hidden_patches = patchify(hidden[:, None].float(), (2, 2)).bool()  # (2, 16, 4)
    top, below = (type(generator).__name__ for generator in model.generators)
    first = Mask.of(hidden_patches.any(-1)) if top == "MAR" else None
    rows = hidden_patches.flatten(0, 1)
    rows = rows[first.rows] if first else rows
    second = Mask.of(rows) if below == "MAR" else None
    _, terms = model(
        RGB.normalize(values), torch.zeros(2, dtype=torch.long), masks=[first, second], train=False, dither=0.0, round_guiding_pixel=True,
        return_terms=True,
    )  # fmt: skip
    found = {term.name: term.nll.double() for term in terms}
    rgb = found["rgb"] if second else found["rgb"][rows.flatten()]
    expected = (rgb.sum() + (found["guiding1"].sum() if "guiding1" in found else 0)).item() / LN2
    assert forced.bits == pytest.approx(expected, rel=1e-5)


def test_known_pixels_restrict_the_guiding_pixel():
    """If one of a patch's four pixels is hidden, the patch's mean is close to the mean of the known ones."""
    hidden = torch.zeros(1, 2, 2, dtype=torch.bool)
    hidden[0, 0, 0] = True
    values = torch.full((1, 3, 2, 2), 200, dtype=torch.uint8)
    known = KnownPixels(RGB.normalize(values), hidden, RGB)
    weights = known.guiding_weights(0, torch.zeros(1, 0, dtype=torch.long))
    possible = weights.isfinite().nonzero()[:, 1]
    assert (possible.min().item(), possible.max().item()) == (150, 214)
    assert weights.argmax().item() == 200
    nothing_known = KnownPixels(RGB.normalize(values), torch.ones_like(hidden), RGB)
    assert (nothing_known.guiding_weights(0, torch.zeros(1, 0, dtype=torch.long)) == 0).all()


def test_the_sampler_draws_guiding_pixels_conditionally_on_known_pixels():
    model, hidden, met = opinionated(tiny_model("guided")), torch.zeros(1, 8, 8, dtype=torch.bool), []
    hidden[0, 0, 0] = True

    def pick(probs, uniforms):
        met.append(probs)
        return probs.argmax(-1)

    values = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    conds = [model.fake_latent] * model.num_conds
    model.sample(conds, (1, 1), pick=pick, known=KnownPixels(RGB.normalize(values), hidden, RGB))
    assert len(met) == 6  # R, G, B of the guiding pixel and of the hidden one
    for probs in met[:3]:
        assert probs[0, 150:215].sum().item() == pytest.approx(1)


def test_images_with_different_masks_are_edited_as_if_each_were_alone(kind):
    model, image = opinionated(tiny_model(kind)), numpy(random_values(4, 8))
    masks = np.stack(
        [ODD_MASKS["one pixel"], np.zeros((8, 8), bool), ODD_MASKS["scattered"], np.ones((8, 8), bool)]
    )
    together = model.edit(image, masks, [0, 1, 2, 3], guidance_scale=2.0, chunk=3, **QUIET)
    for i in range(4):
        alone = model.edit(image[i], masks[i], i, guidance_scale=2.0, indices=[i], **QUIET)
        assert (alone[0] == together[i]).all()


def test_several_results_of_each_image_differ_and_follow_one_another():
    model, image, mask = opinionated(tiny_model()), numpy(random_values(2, 8)), ODD_MASKS["scattered"]
    out = model.edit(image, mask, [0, 3], num_results=2, guidance_scale=1.0, **QUIET)
    assert out.shape == (4, 8, 8, 3)
    for i, one in enumerate(out):
        assert (one == image[i // 2])[~mask].all()
    assert (out[0] != out[1]).any()
    assert (model.edit(image[1], mask, 3, indices=[3], guidance_scale=1.0, **QUIET)[0] == out[3]).all()


def test_any_kind_of_input_gives_the_same():
    model, values, mask = opinionated(tiny_model()), random_values(1, 8), ODD_MASKS["scattered"]
    expected = model.edit(numpy(values), mask, 1, **QUIET)
    images = [
        Image.fromarray(numpy(values)[0]),
        values[0],
        values.double() / 255,
        numpy(values)[0] / 255.0,
        values.int(),
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
        assert (model.edit(values, other, 1, **QUIET) == expected).all()


def test_the_canvas_shows_all_images_and_their_known_pixels_from_the_first_step(kind):
    model, image, seen = opinionated(tiny_model(kind)), random_values(3, 8), []
    masks = np.stack([ODD_MASKS["scattered"], np.zeros((8, 8), bool), ODD_MASKS["one pixel"]])
    call = lambda step, steps, canvas: seen.append((step, steps, numpy(RGB.to_values(canvas))))  # noqa: E731
    out = model.edit(image, masks, [0, 1, 2], callback_on_step_end=call, **QUIET)
    assert [step for step, *_ in seen] == list(range(seen[0][1]))
    for _, _, canvas in seen:
        assert (canvas == numpy(image))[~masks].all()
    assert (seen[-1][2] == out).all()


def test_half_precision_keeps_known_pixels_too():
    model, values, mask = (
        opinionated(tiny_model("guided")).bfloat16(),
        random_values(2, 8),
        ODD_MASKS["scattered"],
    )
    assert (model.edit(values, mask, [0, 1], **QUIET) == numpy(values))[:, ~mask].all()


def test_scale_and_temperature_by_level():
    model, values, mask = opinionated(tiny_model("guided")), random_values(1, 8), np.ones((8, 8))
    same = model.edit(values, mask, 1, guidance_scale=[2.0, 2.0], temperature=[1.1, 1.1], **QUIET)
    assert (same == model.edit(values, mask, 1, guidance_scale=2.0, temperature=1.1, **QUIET)).all()
    others = [dict(guidance_scale=[1.0, 2.0]), dict(guidance_scale=[2.0, 1.0]), dict(temperature=[5.0, 1.1])]
    drawn = [
        model.edit(values, mask, 1, **{"guidance_scale": 2.0, "temperature": 1.1, **other}, **QUIET)
        for other in others
    ]
    assert all((one != same).any() for one in drawn)
    with pytest.raises(
        ValueError,
        match=r"guidance_scale \[1.0\] must be one number, or 2, one for each level above the pixel",
    ):
        model.edit(values, mask, 1, guidance_scale=[1.0], **QUIET)


@pytest.mark.parametrize("name", ["fractalmar_tiny_in32", "fractalmar_tiny_in64"])
def test_operations_follow_the_hidden_share(name):
    model = build(name, class_num=3).eval()
    side = model.img_size_list[0]
    conds, steps = [model.fake_latent.detach()] * model.num_conds, [8] + [2] * (len(model.generators) - 1)
    counts = []
    for mask in (torch.ones(side, side, dtype=torch.bool), box_mask(side, (0, 0, side // 2, side // 2))):
        known = KnownPixels(RGB.normalize(random_values(1, side)), mask[None], RGB)
        with (
            torch.no_grad(),
            patch("models.sampling.prepare.packed_rows", lambda dtype: range(0)),
        ):  # FlopCounterMode does not count oneDNN's operations.
            sampler = build_sampler(model, Setup(torch.float32))
            with FlopCounterMode(display=False) as counter:
                noise = model.noise(0, [0])
                sampler.sample(Batch(conds, Guidance(), noise, tuple(steps), known))
        counts.append(counter.get_total_flops())
    assert counts[1] < 0.3 * counts[0]


def test_outpainting_uncropping_and_another_class_are_edits():
    model, values = opinionated(tiny_model()), random_values(1, 8)
    image = numpy(values)
    inside = box_mask(8, (2, 1, 5, 4)).numpy()
    assert inside.sum() == 20
    assert inside[1:5, 2:7].all()
    out = model.outpaint(values, (2, 1, 5, 4), 1, **QUIET)
    assert (out == image)[:, inside].all()
    assert (out == model.edit(values, ~inside, 1, **QUIET)).all()
    assert (
        model.edit_class(values, (2, 1, 5, 4), 3, **QUIET) == model.edit(values, inside, 3, **QUIET)
    ).all()
    small = values[:, :, 1:5, 2:7]
    placed = model.uncrop(small, (2, 1), 1, **QUIET)
    assert (placed[:, 1:5, 2:7] == numpy(small)).all()
    with pytest.raises(
        UserError, match=r"position: 4 1 5 4 \(x, y, width, height\) is not within the 8 x 8 pixels"
    ):
        model.uncrop(small, (4, 1), 1, **QUIET)


def test_a_model_in_training_is_edited_without_dropout_and_stays_in_training():
    model, values, mask = opinionated(tiny_model()), random_values(1, 8), ODD_MASKS["scattered"]
    expected = model.edit(values, mask, 1, **QUIET)
    assert (model.train().edit(values, mask, 1, **QUIET) == expected).all()
    assert all(module.training for module in model.modules())


def test_a_model_without_classes_is_edited():
    model, values, mask = tiny_model(class_num=0), random_values(2, 8), ODD_MASKS["scattered"]
    assert (model.edit(values, mask, num_results=2, **QUIET)[::2] == numpy(values))[:, ~mask].all()
    with pytest.raises(ValueError, match="class_labels 0 is given, but the model has no classes"):
        model.edit(values, mask, 0, **QUIET)


def test_edits_with_the_feature_cache_keep_known_pixels():
    model, values, mask = (
        opinionated(tiny_model("guided")),
        random_values(1, 8),
        ODD_MASKS["a box across patches"],
    )
    out = model.edit(values, mask, 1, feature_cache_interval=2, **QUIET)
    assert (out == numpy(values))[:, ~mask].all()
    assert (out != model.edit(values, mask, 1, **QUIET)).any()  # approximate
