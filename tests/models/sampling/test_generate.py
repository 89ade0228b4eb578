"""`generate` draws an image for each label; an image does not depend on the others of its batch."""

import gc

import numpy as np
import pytest
import torch

from conftest import TINY, opinionated, random_values, tiny_model
from models.sampling.options import SamplingOptions
from models.sampling.prepare import FastLinear
from util.pixels import RGB

SETTINGS = dict(num_inference_steps=(6, 3), guidance_scale=2.0, temperature=1.1, seed=3, progress_bar=False)


def assert_same_images(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Asserts that all values are equal, except for rare ones that differ by 1.

    Rounding depends on the batch size, and a uniform number may lie at the edge of two values of the CDF.
    """
    assert ours.shape == theirs.shape
    assert (ours == theirs).mean() >= 0.999
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_an_image_is_the_same_alone_in_a_batch_of_seven_and_in_another_order(kind):
    model = opinionated(tiny_model(kind))
    labels = [0, 1, 2, 3, 0, 1, 2]
    seven = model.generate(labels, output_type="np", **SETTINGS)
    alone = model.generate(labels[4], indices=[4], output_type="np", **SETTINGS)
    assert_same_images(alone[0], seven[4])
    backwards = model.generate(labels[::-1], indices=range(6, -1, -1), output_type="np", **SETTINGS)
    assert_same_images(backwards[::-1], seven)
    others = model.generate([3 - label for label in labels], output_type="np", **SETTINGS)
    assert (others == seven).mean() < 0.5  # the comparisons above could have failed


def test_prepared_weights_are_freed_without_the_garbage_collector(kind):
    model = tiny_model(kind)
    gc.collect()
    gc.disable()
    try:
        model.generate([0], **SETTINGS)
        assert [layer for layer in gc.get_objects() if type(layer) is FastLinear] == []
    finally:
        gc.enable()


def test_sampling_under_autocast(kind):
    model = tiny_model(kind)
    with torch.autocast("cpu", torch.bfloat16):
        drawn = model.generate([0, 1], output_type="pt", **SETTINGS)
    assert drawn.dtype == torch.float32  # pixels are exact values, whatever dtype the layers computed in
    assert torch.equal(RGB.normalize(RGB.to_values(drawn)), drawn)


def test_seed_generator_and_global_seed_each_repeat_the_image():
    model = tiny_model("mar")
    settings = {**SETTINGS, "output_type": "np"}
    del settings["seed"]
    draw = lambda **how: model.generate([1], **settings, **how)  # noqa: E731
    assert np.array_equal(draw(seed=5), draw(seed=5))
    assert not np.array_equal(draw(seed=5), draw(seed=6))
    assert np.array_equal(*(draw(generator=torch.Generator().manual_seed(1)) for _ in range(2)))
    first = [torch.manual_seed(9) and draw() for _ in range(2)]
    assert np.array_equal(*first)
    assert not np.array_equal(first[0], draw())


def test_output_types_agree():
    model = tiny_model("mar")
    pil, array, tensor = (
        model.generate([0, 1], output_type=kind, **SETTINGS) for kind in ("pil", "np", "pt")
    )
    assert array.dtype == np.uint8
    assert np.array_equal(np.stack([np.asarray(image) for image in pil]), array)
    assert tensor.shape == (2, 3, 8, 8)


def test_callback_sees_the_canvas_grow_to_the_result():
    model = tiny_model("mar")
    seen = []
    drawn = model.generate(
        [2], output_type="pt", callback_on_step_end=lambda *step: seen.append(step), **SETTINGS
    )
    assert [step for step, *_ in seen] == list(range(6))
    assert {total for _, total, _ in seen} == {6}
    known = [canvas.count_nonzero().item() for *_, canvas in seen]
    assert known == sorted(known)
    assert torch.equal(seen[-1][2], drawn)


def test_unconditional_images_need_no_labels():
    model = tiny_model("mar")
    settings = {**SETTINGS, "guidance_scale": 1.0}
    assert len(model.generate(num_images=3, **settings)) == 3
    assert len(model.generate(**settings)) == 1


def test_a_model_without_classes_draws_unconditional_images_only():
    model = tiny_model("mar", class_num=0)
    assert len(model.generate(num_images=2, **{**SETTINGS, "guidance_scale": 1.0})) == 2
    with pytest.raises(ValueError, match="class_labels 0 is given, but the model has no classes"):
        model.generate([0], **SETTINGS)


def test_defaults_are_those_of_the_model(monkeypatch):
    model = tiny_model("mar")
    asked = {}
    monkeypatch.setattr(
        "models.sampling.generate.sample_images",
        lambda model, conds, options, *_, **more: asked.update(options=options) or torch.zeros(1, 3, 8, 8),
    )
    model.generate([0], progress_bar=False)
    assert asked["options"] == SamplingOptions((16, 4), 1.0, "linear", 1.0, 1e-4)
    model.generate([0], progress_bar=False, temperature=1.5, guidance_scale=None)
    assert asked["options"] == SamplingOptions((16, 4), temperature=1.5)
    with pytest.raises(TypeError, match="temprature"):
        model.generate([0], progress_bar=False, temprature=1.5)


@pytest.mark.parametrize("kind", TINY)
def test_watching_deeper_levels_shows_patches_grow_and_changes_nothing(kind):
    model, seen = opinionated(tiny_model(kind)), []
    settings = dict(num_inference_steps=(4, 3), seed=1, output_type="pt", progress_bar=False)
    watched = model.generate(
        [1, 2], watch_levels=2, callback_on_step_end=lambda *step: seen.append(step), **settings
    )
    assert torch.equal(watched, model.generate([1, 2], **settings))
    plain = []
    model.generate([1, 2], callback_on_step_end=lambda *step: plain.append(step), **settings)
    assert len(seen) > 2 * len(plain)
    assert sorted({step for step, *_ in seen}) == [step for step, *_ in plain]
    for step, num_steps, canvas in plain:  # the last canvas of each step
        last = [one for one in seen if one[0] == step][-1]
        assert last[1] == num_steps
        assert torch.equal(last[2], canvas)
    known = [(canvas == seen[-1][2]).sum().item() for _, _, canvas in seen]
    assert known == sorted(known)
    assert len(set(known)) > len(plain) + 1


def test_the_callback_sees_all_images_also_those_with_nothing_to_draw():
    model, image, seen = opinionated(tiny_model()), random_values(2, 8), []
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[1, 3:6, 2:5] = True
    options = dict(seed=1, output_type="pt", progress_bar=False, watch_levels=2)
    out = model.edit(image, masks, 1, callback_on_step_end=lambda *step: seen.append(step), **options)
    assert {canvas.shape for *_, canvas in seen} == {(2, 3, 8, 8)}
    assert torch.equal(seen[-1][2], out)
    assert all((canvas[0] == out[0]).all() for *_, canvas in seen)


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


def test_one_number_of_steps_counts_for_all_levels_and_is_no_more_than_their_patches(caplog):
    model = opinionated(tiny_model())
    draw = lambda steps: model.generate(1, **{**SETTINGS, "num_inference_steps": steps}, output_type="np")  # noqa: E731
    assert np.array_equal(draw(3), draw((3, 3)))
    assert np.array_equal(draw(9), draw((9, 4)))  # level 1 has four patches
    assert warnings(caplog) == []


def test_more_steps_than_patches_are_one_warning(caplog):
    model = opinionated(tiny_model())
    settings = dict(seed=0, progress_bar=False, output_type="np")
    drawn = [
        model.generate([0, 1, 2], num_inference_steps=steps, chunk=2, **settings)
        for steps in [(16, 4), (99, 5), (99, 5)]
    ]
    model.log_likelihood(random_values(1, 8), num_inference_steps=(99, 5), progress_bar=False)
    assert warnings(caplog) == [
        "more steps than patches: level 0 takes 16 instead of 99 steps, level 1 takes 4 instead of 5 steps, "
        "one for each patch"
    ]
    assert np.array_equal(drawn[0], drawn[1])
    model.generate(0, num_inference_steps=17, **settings)
    assert len(warnings(caplog)) == 2  # one number, but more than any level has patches
