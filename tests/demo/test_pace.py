"""How long a work will take, in words, from what was measured."""

import pytest

from conftest import tiny_model
from demo import pace


def test_only_long_work_that_was_measured_before_is_announced():
    measured = pace.Pace()
    assert measured.announce("pass", 1e9) == ""
    measured.measure("pass", 2, 8.0)
    assert measured.announce("pass", 2) == ""
    assert measured.announce("pass", 10) == "This takes about 40 s."
    assert measured.announce("drawing", 10) == ""
    measured.measure("pass", 1, 60.0)  # the last measurement counts
    assert measured.announce("pass", 10) == "This takes about 10 minutes."


def test_the_time_that_is_left():
    assert pace.time_left(2.0, 0.5) == ""
    assert pace.time_left(3.0, 0.2) == ", about 12 s left"
    assert pace.time_left(14.9, 0.99) == ", about 1 s left"


@pytest.mark.parametrize(
    ("seconds", "words"), [(13.4, "13 s"), (42, "40 s"), (131, "2 minutes"), (7300, "2 hours")]
)
def test_lengths_of_time_in_words(seconds, words):
    assert pace.in_words(seconds) == f"about {words}"


def test_the_work_of_a_drawing():
    options = dict(num_inference_steps=(3, 2), guidance_scale=1.0)
    assert pace.drawing_work(tiny_model("mar"), 4, options) == 4 * 3 * 2
    assert pace.drawing_work(tiny_model("mar"), 4, {**options, "guidance_scale": 2.0}, 0.5) == 4 * 3 * 2
    assert pace.drawing_work(tiny_model("mar over ar"), 1, options) == 3 * 4  # one step a patch
