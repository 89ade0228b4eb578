"""Every public function refuses bad arguments in one line that names the argument as the caller wrote it."""

import math

import numpy as np
import pytest
import torch

from conftest import random_values, tiny_model
from models.likelihood.inside import look_inside
from models.sampling.constraints import Palette, Within
from models.sampling.edit import box_mask
from util.errors import UserError

NAN, INF = math.nan, math.inf
IMAGE, MASK = random_values(1, 8), np.ones((8, 8))
COND = torch.zeros(2, 32)


@pytest.fixture(scope="module")
def model():
    """A model with names, two MAR levels and no weights that matter: every call must fail before they are used."""
    named = tiny_model("mar")
    named.class_names = ["cat", "Cat", "red heart", "golden retriever"]
    return named


@pytest.fixture(scope="module")
def nameless():
    return tiny_model("ar", class_num=0)


# The options of `generate`, which edit, outpaint, uncrop and edit_class pass on.
OPTIONS = [
    (dict(num_inference_steps=0), "num_inference_steps 0 must be at least 1"),
    (dict(num_inference_steps=2.0), "num_inference_steps 2.0 must be an integer, at least 1"),
    (dict(num_inference_steps="64,16"), "num_inference_steps '64,16' must be an integer"),
    (dict(num_inference_steps=(4,)), "num_inference_steps 4 must be 2 numbers, the steps of each level"),
    (dict(num_inference_steps=[4, 4, 4]), "num_inference_steps 4,4,4 must be 2 numbers"),
    (dict(num_inference_steps=[4, -1]), "num_inference_steps -1 must be at least 1"),
    (dict(num_inference_steps=[4, NAN]), "num_inference_steps nan must be an integer"),
    (
        dict(guidance_scale=0.5),
        "guidance_scale 0.5 must be a finite number from 1, which is without guidance",
    ),
    (dict(guidance_scale=NAN), "guidance_scale nan must be a finite number from 1"),
    (dict(guidance_scale=INF), "guidance_scale inf must be a finite number from 1"),
    (dict(guidance_scale="2"), "guidance_scale '2' must be a finite number from 1"),
    (dict(guidance_scale=True), "guidance_scale True must be a finite number from 1"),
    (dict(guidance_scale=[2, None]), "guidance_scale None must be a finite number from 1"),
    (dict(guidance_scale=[2, 2, 2]), "guidance_scale [2, 2, 2] must be one number, or 2, one for each level"),
    (dict(guidance_schedule="cosine"), "guidance_schedule 'cosine' must be one of linear, constant"),
    (dict(guidance_schedule=["linear"]), "guidance_schedule ['linear'] must be one of linear, constant"),
    (dict(temperature=0), "temperature 0 must be a finite number above 0"),
    (dict(temperature=NAN), "temperature nan must be a finite number above 0"),
    (dict(temperature=[1.0]), "temperature [1.0] must be one number, or 2"),
    (dict(temperature=torch.tensor([1.0, -1.0])), "temperature -1.0 must be a finite number above 0"),
    (dict(filter_threshold=2), "filter_threshold 2 must be a number from 0 to 1"),
    (dict(filter_threshold=NAN), "filter_threshold nan must be a number from 0 to 1"),
    (dict(filter_threshold="a"), "filter_threshold 'a' must be a number from 0 to 1"),
    (dict(chunk=0), "chunk 0 must be at least 1"),
    (dict(chunk=1.5), "chunk 1.5 must be an integer"),
    (dict(watch_levels=0), "watch_levels 0 must be at least 1"),
    (dict(feature_cache_interval=0), "feature_cache_interval 0 must be at least 1"),
    (dict(amp="half"), "amp 'half' must be None or one of off, bf16, fp16"),
    (dict(seed=-1), "seed -1 must be from 0 to 9223372036854775807"),
    (dict(seed=1.5), "seed 1.5 must be an integer"),
    (dict(seed="7"), "seed '7' must be an integer"),
    (dict(seed=[1, 2, 3]), "seed [1, 2, 3] must be one number, or 2"),
    (dict(generator=7), "generator 7 must be a torch.Generator"),
    (dict(seed=1, generator=torch.Generator()), "give seed or generator, not both"),
    (dict(indices=[1, 2]), "indices must hold one number for each of the 1 images"),
    (dict(indices=5), "indices must hold one number for each of the 1 images"),
    (dict(indices=["a"]), "indices 'a' must be an integer"),
    (dict(output_type="png"), "output_type 'png' must be one of pil, np, pt"),
    (dict(output_type=["pil"]), "output_type ['pil'] must be one of pil, np, pt"),
    (dict(callback_on_step_end=5), "callback_on_step_end 5 must be a function"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options(model, options, message):
    for call in (model.generate, lambda *labels, **given: model.edit(IMAGE, MASK, *labels, **given)):
        with pytest.raises(UserError) as caught:
            call(1, progress_bar=False, **options)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


LABELS = [
    (4, "{} 4 is no class of the model; give one of its names or a number from 0 to 3"),
    (-1, "{} -1 is no class of the model"),
    (1.0, "{} 1.0 is no class of the model"),
    (NAN, "{} nan is no class of the model"),
    (True, "{} True is no class of the model"),
    (np.array([7]), "{} 7 is no class of the model"),
    ([[1]], "{} [1] is no class of the model"),
    ([], "{} must hold at least one class"),
    ("CAT", "{} 'CAT' may be 0 or 1; give the number"),
    (["golden retreiver"], "{} 'golden retreiver' is no class of the model; give one of its names or a number from 0 to 3; perhaps golden retriever"),
]  # fmt: skip


@pytest.mark.parametrize(("label", "message"), LABELS)
def test_classes(model, label, message):
    calls = {
        "class_labels": [
            model.generate,
            lambda label: model.edit(IMAGE, MASK, label),
            lambda label: model.outpaint(IMAGE, (0, 0, 4, 4), label),
            lambda label: model.uncrop(IMAGE[:, :, :4, :4], (0, 0), label),
            lambda label: model.edit_class(IMAGE, (0, 0, 4, 4), label),
            lambda label: model.log_likelihood(IMAGE, label),
        ],
        "classes": [lambda label: model.classify(IMAGE, label)],
        "class_label": [lambda label: look_inside(model, IMAGE, (0, 0), label)],
    }
    for name, functions in calls.items():
        for function in functions:
            with pytest.raises(UserError) as caught:
                function(label)
            assert str(caught.value).startswith(message.format(name))


SAMPLE = [
    (dict(cond_list=[COND] * 4), "cond_list must hold 5 tensors of one shape, (rows, 32)"),
    (dict(cond_list=[COND[:, :3]] * 5), "cond_list must hold 5 tensors of one shape, (rows, 32)"),
    (dict(cond_list=[]), "cond_list must hold 5 tensors"),
    (dict(cond_list=[COND[:1]] * 5, cfg=2.0), "cond_list has 1 rows; guidance needs an even number of rows"),
    (dict(num_iter_list=(4,)), "num_iter_list 4 must be 2 numbers, the steps of each level"),
    (dict(num_iter_list=0), "num_iter_list 0 must be at least 1"),
    (dict(cfg=0.5), "cfg 0.5 must be a finite number from 1"),
    (dict(cfg_schedule="cosine"), "cfg_schedule 'cosine' must be one of linear, constant"),
    (dict(temperature=-1), "temperature -1 must be a finite number above 0"),
    (dict(filter_threshold=2), "filter_threshold 2 must be a number from 0 to 1"),
    (dict(fractal_level=1), "fractal_level 1 is not this module's, which is 0"),
]


@pytest.mark.parametrize(("arguments", "message"), SAMPLE)
def test_the_published_call(model, arguments, message):
    with pytest.raises(UserError) as caught:
        model.sample(**{"cond_list": [COND] * 5, "num_iter_list": (4, 4), **arguments})
    assert str(caught.value).startswith(message)


OTHERS = [
    (lambda m: m.generate(num_images=0), "num_images 0 must be at least 1"),
    (lambda m: m.generate(num_images=1.5), "num_images 1.5 must be an integer"),
    (lambda m: m.generate([0], num_images=2), "num_images 2 contradicts the 1 class_labels"),
    (lambda m: m.generate(guidance_scale=2.0), "guidance_scale 2.0 needs class_labels; unconditional images have 1"),
    (lambda m: m.edit(IMAGE[:, :, 1:], MASK), "image of 8 x 7 pixels for a model of 8 x 8 pixels; crop it"),
    (lambda m: m.edit("a.png", MASK), "image must be a PIL image, an array or a tensor, or a list of them, got str"),
    (lambda m: m.edit(IMAGE, np.ones((8, 9))), "mask of 9 x 8 pixels for an image of 8 x 8 pixels"),
    (lambda m: m.edit(IMAGE, MASK * NAN), "mask is not binary"),
    (lambda m: m.edit(IMAGE, None), "mask must be a PIL image, an array or a tensor"),
    (lambda m: m.edit(random_values(3, 8), np.ones((2, 8, 8))), "3 images and 2 masks; give one of either, or as many"),
    (lambda m: m.edit(random_values(3, 8), MASK, [0, 1]), "class_labels must be one class, or one for each of the 3 images"),
    (lambda m: m.edit(IMAGE, MASK, num_results=0), "num_results 0 must be at least 1"),
    (lambda m: m.edit(IMAGE, MASK, constraint=4), "constraint 4 must be a Constraint or a function"),
    (lambda m: m.outpaint(IMAGE, (0, 0, 4)), "box (0, 0, 4) must be 4 integers, x, y, width, height"),
    (lambda m: m.outpaint(IMAGE, 4), "box 4 must be 4 integers"),
    (lambda m: m.edit_class(IMAGE, (0, 0, 4.5, 4), 1), "box 4.5 must be an integer"),
    (lambda m: m.edit_class(IMAGE, (5, 0, 4, 4), 1), "box 5 0 4 4 (x, y, width, height) is not within the 8 x 8 pixels"),
    (lambda m: m.uncrop(IMAGE, (0,)), "position (0,) must be 2 integers, x, y"),
    (lambda m: m.uncrop(IMAGE[:, :, :4, :4], (5, 0)), "image and position: 5 0 4 4 (x, y, width, height) is not within the 8 x 8 pixels"),
    (lambda m: m.uncrop(IMAGE[:, :, :4, :4], (0, NAN)), "position nan must be an integer"),
    (lambda m: box_mask(8, (0, 0, 0, 4)), "box 0 0 0 4 (x, y, width, height) is not within the 8 x 8 pixels"),
    (lambda m: m.log_likelihood(random_values(1, 9)), "image of 9 x 9 pixels for a model of 8 x 8 pixels; crop it first"),
    (lambda m: m.log_likelihood(IMAGE / 255 * NAN), "image has torch.float32 values from nan to nan"),
    (lambda m: m.log_likelihood(random_values(3, 8), [0, 1]), "class_labels must be one class, or one for each of the 3"),
    (lambda m: m.log_likelihood(IMAGE, 0, "patch"), "reduce 'patch' must be one of image, pixel, channel, level"),
    (lambda m: m.log_likelihood(IMAGE, num_orders=0), "num_orders 0 must be at least 1"),
    (lambda m: m.log_likelihood(IMAGE, num_inference_steps=[4]), "num_inference_steps 4 must be 2 numbers"),
    (lambda m: m.log_likelihood(IMAGE, seed=0.5), "seed 0.5 must be an integer"),
    (lambda m: m.classify(IMAGE, prior=[1]), "prior [1] must be 4 numbers from 0, one for each class, not all 0"),
    (lambda m: m.classify(IMAGE, prior=1), "prior 1 must be 4 numbers from 0"),
    (lambda m: m.classify(IMAGE, prior=[0, 0, 0, 0]), "prior [0, 0, 0, 0] must be 4 numbers from 0"),
    (lambda m: m.classify(IMAGE, prior=[1, 1, 1, NAN]), "prior nan must be one of 4 numbers from 0"),
    (lambda m: m.classify(IMAGE, num_orders=1.5), "num_orders 1.5 must be an integer"),
    (lambda m: look_inside(m, IMAGE, (8, 0)), "pixel 8 0 is not within the 8 x 8 pixels"),
    (lambda m: look_inside(m, IMAGE, 3), "pixel 3 must be 2 integers, x, y"),
    (lambda m: look_inside(m, random_values(2, 8), (0, 0)), "2 images; give one"),
    (lambda m: look_inside(m, IMAGE, (0, 0), [0, 1]), "class_label must be one class"),
    (lambda m: look_inside(m, IMAGE, (0, 0), index=-1), "index -1 must be from 0 to"),
    (lambda m: Within(-1), "distance -1 must be at least 0"),
    (lambda m: Within(NAN), "distance nan must be an integer"),
    (lambda m: m.edit(IMAGE, MASK, constraint=Palette([[0, 0, 256]])), "colours must have 3 numbers each, from 0 to 255"),
    (lambda m: Palette([0, 0, 25]), "colours must be one or more, each with an integer"),
    (lambda m: m.edit(IMAGE, MASK, constraint=Palette([[0, 0]])), "colours must have 3 numbers each"),
    (lambda m: Palette([]), "colours must be one or more, each with an integer"),
    (lambda m: Palette([[0.5, 0, 0]]), "colours must be one or more, each with an integer"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), OTHERS)
def test_other_arguments(model, call, message):
    with pytest.raises(UserError) as caught:
        call(model)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_model_without_classes(nameless):
    for label in (0, "cat"):
        with pytest.raises(
            UserError, match=f"^class_labels {label!r} is given, but the model has no classes"
        ):
            nameless.generate(label)
    with pytest.raises(UserError, match="the model has no classes to choose from"):
        nameless.classify(IMAGE)
    with pytest.raises(
        UserError, match=r"^feature_cache_interval 2 must be 1, or above 1 for a model whose level 0"
    ):
        nameless.generate(feature_cache_interval=2)


def test_an_option_that_does_not_exist_is_named(model):
    with pytest.raises(TypeError, match="temprature"):
        model.generate(0, temprature=1.5)
