"""Classes are named or numbered wherever a label goes."""

import numpy as np
import pytest
import torch

from conftest import opinionated, random_values, tiny_model
from models.hub.classes import imagenet_names
from models.likelihood.inside import look_inside
from models.sampling.labels import check_labels, find_class
from util.errors import UserError

QUIET = dict(progress_bar=False)


@pytest.fixture(scope="module")
def model():
    named = opinionated(tiny_model())
    named.class_names = ["cat", "dog", "red heart", "3"]
    return named


def test_names_in_any_case_and_numbers(model):
    names = imagenet_names()
    found = [find_class(said, names, 1000) for said in ("Golden Retriever", "387", "Cardigan", "cardigan")]
    assert (len(names), found) == (1000, [207, 387, 264, 474])
    assert find_class("1", ["1", "0"], 2) == 0  # a name goes before a number
    assert check_labels(model, ["Red Heart", 1, "0", np.int64(2)]) == [2, 1, 0, 2]
    assert check_labels(model, torch.tensor([3, 0])) == [3, 0]
    assert check_labels(model, None) is None


def test_names_that_come_close_are_suggested_and_those_of_a_hostile_file_move_no_cursor():
    with pytest.raises(UserError, match=r"perhaps .*golden retriever"):
        find_class("golden retreiver", imagenet_names(), 1000)
    with pytest.raises(UserError, match=r"perhaps \?\[2Jcat$"):
        find_class("cats", ["\x1b[2Jcat"], 1)


def test_every_call_takes_names(model):
    image, mask, box = random_values(1, 8), np.ones((8, 8)), (0, 0, 4, 4)
    options = dict(output_type="np", seed=1, num_inference_steps=2, **QUIET)
    calls = [
        lambda label: model.generate(label, **options),
        lambda label: model.generate([label, 1], **options),
        lambda label: model.edit(image, mask, label, **options),
        lambda label: model.outpaint(image, box, label, **options),
        lambda label: model.edit_class(image, box, label, **options),
        lambda label: model.uncrop(image[:, :, :4, :4], (1, 1), label, **options),
        lambda label: model.log_likelihood(image, label, **QUIET).bits.numpy(),
        lambda label: model.classify(image, [1, label], num_orders=1, **QUIET).numpy(),
        lambda label: look_inside(model, image, (0, 0), label).entropy.numpy(),
    ]
    for call in calls:
        assert np.array_equal(call("red heart"), call(2))
        assert not np.array_equal(call(0), call(2))  # the comparison could have failed
