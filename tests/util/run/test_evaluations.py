import math
from dataclasses import asdict

import pytest

from util.run.evaluations import Evaluations


def test_only_a_lower_score_is_better_and_the_others_are_counted():
    seen = Evaluations()
    assert [seen.note(step, bits, None) for step, bits in enumerate((3.0, 3.0, 2.5, 2.6, 2.5))] == [
        True, False, True, False, False,
    ]  # fmt: skip
    assert asdict(seen) == {"best": 2.5, "best_step": 2, "since_best": 2, "caught_up": False}
    assert str(seen) == "2 evaluation(s) after the best, 2.5000 bits/dim at step 2"


def test_the_average_has_caught_up_once_it_is_at_most_one_percent_worse():
    seen = Evaluations()
    for bits, raw, caught_up in ((2.0, 1.9, False), (1.0, None, False), (2.0, 1.99, True), (2.0, 1.0, True)):
        seen.note(1, bits, raw)
        assert seen.caught_up == caught_up


def test_what_a_checkpoint_holds_comes_back_and_older_ones_hold_nothing():
    seen = Evaluations(2.5, 7, 3, True)
    assert Evaluations.restored(asdict(seen)) == seen
    assert Evaluations.restored({}) == Evaluations(math.inf, 0, 0, False)
    with pytest.raises(TypeError):
        Evaluations.restored({"best": [1]})
