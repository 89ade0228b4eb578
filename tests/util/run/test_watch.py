import math
import random

import pytest
import torch

from util.run.watch import Diverged, LossWatch


def judged(losses, watch=None, every: int = 20) -> LossWatch:
    """A watch that has seen these losses and judged them after `every` steps; a nan is a skipped step."""
    watch = LossWatch() if watch is None else watch
    for step, loss in enumerate(losses):
        watch.note(torch.tensor(loss), torch.tensor(1.0 if math.isfinite(loss) else loss), step)
        if (step + 1) % every == 0:
            watch.read()
    watch.read()
    return watch


def noisy(number: int, mean: float, spread: float) -> list[float]:
    """Losses of batches: `spread` is the standard deviation of their logarithm."""
    rng = random.Random(0)
    return [mean * rng.lognormvariate(0, spread) for _ in range(number)]


@pytest.mark.parametrize(
    "losses",
    [
        [1 + 4.5 * 0.99**step for step in range(1000)],
        [5.5, 9.0, 20.0, 15.0, 7.0, *(5.5 * 0.99**step for step in range(300))],  # too fast a start
        noisy(2000, 1.0, 0.25),
        noisy(2000, 1e-4, 3.0),  # images that are nearly all alike
        [2.0] * 300 + [9.0] * 60 + [2.0] * 300,  # it recovers
        [math.nan] * 10 + [5.0] * 30,
    ],
    ids=["falling", "steep start", "noisy", "tiny", "spike", "scaler"],
)
def test_a_normal_run_is_not_given_up(losses):
    watch = LossWatch()
    for first in range(0, len(losses), 20):
        judged(losses[first : first + 20], watch)
        watch.check(20, "", ended=False)
    watch.check(20, "", ended=True)
    assert not watch.is_bad


def test_a_loss_that_stays_high_after_few_steps_is_not_taken_for_normal():
    watch = judged([5.5] * 6 + [550.0] * 100)
    assert watch.is_bad
    assert watch.limit < 100


@pytest.mark.parametrize(("before", "after"), [(1.1, 5.545), (2.2, 5.545), (8.7, 22.0), (5.5, 1e11)])
def test_a_loss_that_stays_far_above_its_median_is_given_up_and_not_taken_for_normal(before, after):
    watch = judged([before] * 300 + [after] * 30)
    assert watch.is_bad
    assert watch.skipped == 0
    watch.check(20, "", ended=False)
    with pytest.raises(Diverged, match=r"in 30 of the last 200 steps the loss was not finite or far above"):
        watch.check(20, "", ended=True)
    judged([after] * 80, watch)
    with pytest.raises(Diverged, match="in 110 of the last 200 steps"):
        watch.check(20, "", ended=False)
    watch.check(200, "", ended=False)


def test_skipped_steps_in_a_row_are_counted_and_end_a_run_of_nothing_else():
    watch = judged([1.0, 2.0, math.nan, math.inf, math.nan, 1.0])
    assert (watch.skipped, watch.longest_row, watch.row_began) == (3, 3, 2)
    with pytest.raises(Diverged, match="not finite in 3 steps in a row"):
        watch.check(2, "here", ended=False)
    watch.check(3, "here", ended=False)
    with pytest.raises(Diverged, match=r"in 2 of the last 2 steps the loss was not finite$"):
        judged([math.nan] * 2).check(20, "", ended=True)


def test_what_a_checkpoint_keeps_does_not_depend_on_when_the_losses_are_read():
    losses = [*noisy(300, 1.0, 0.5), *[40.0] * 30, *noisy(30, 1.0, 0.5)]
    assert list(judged(losses, every=1).losses) == list(judged(losses, every=50).losses)


def test_a_checkpoint_is_confirmed_by_the_first_loss_after_it():
    watch = judged([1.0] * 30)
    for losses, followed in (([1.1, 50.0], True), ([50.0, 1.1], False), ([math.nan], False)):
        watch.followed = None
        assert judged(losses, watch).followed is followed
