"""What is said before a run begins."""

from argparse import Namespace

import pytest
import torch

from conftest import random_values, save_image
from util.data.folders import class_folders
from util.data.loader import ImageDataset
from util.pixels import RGB
from util.run import plan
from util.run.settings import TINY_BATCH, TINY_STEPS, fill_in


def flags(**given) -> Namespace:
    names = "class_num batch_size epochs warmup_epochs eval_freq save_last_freq r_weight attn_dropout "
    names += "proj_dropout ema ema_decay blr num_workers lr"
    return Namespace(**{**dict.fromkeys(names.split()), "accum_iter": 1, **given})


@pytest.mark.parametrize(("images", "processes"), [(270, 1), (5, 1), (100_000, 8), (3, 2)])
def test_a_tiny_model_trains_for_thousands_of_steps_whatever_the_data(images, processes):
    args = flags()
    fill_in(args, tiny_lr=1.5e-3, num_images=images, processes=processes)
    steps = images // (args.batch_size * processes)
    assert steps >= 1
    assert args.batch_size <= TINY_BATCH
    assert TINY_STEPS <= steps * args.epochs < TINY_STEPS + steps
    assert (args.lr, args.ema, args.attn_dropout) == (1.5e-3, True, 0.0)
    assert 1 / (1 - args.ema_decay) == pytest.approx(steps * args.epochs / 20, rel=0.02)


def test_what_is_given_stays_and_a_base_rate_counts():
    args = flags(epochs=3, batch_size=8, blr=1e-3, ema=False)
    fill_in(args, tiny_lr=1.5e-3, num_images=80, processes=2)
    assert (args.epochs, args.batch_size, args.ema, args.lr) == (3, 8, False, 1e-3 * 16 / 256)


def test_other_models_have_the_published_defaults():
    args = flags()
    fill_in(args, tiny_lr=None, num_images=270, processes=1)
    assert (args.batch_size, args.epochs, args.warmup_epochs, args.ema) == (64, 400, 40, False)
    assert args.lr == 5e-5 * 64 / 256


def images(folder, values: torch.Tensor, label: str = "a") -> None:
    for number, image in enumerate(values):
        save_image(folder / label / f"{number}.png", image)


def faults(folder, size: int = 8, steps: int = 10, **given) -> list[str]:
    args = Namespace(**{"epochs": 1000, "ema": False, "ema_decay": 0.9, "class_num": 1, **given})
    return plan.find_faults(args, ImageDataset(class_folders(folder), (size, size), RGB, seed=0), steps)


def test_nothing_is_said_of_good_images_and_settings(tmp_path):
    images(tmp_path, random_values(4, 8))
    assert faults(tmp_path, ema=True) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epochs": 12}, "120 steps are few"),
        ({"steps": 0}, "a step has more images than the 4 for training: give a smaller --batch_size"),
        ({"ema": True, "ema_decay": 0.99999}, "--ema_decay 0.99999 averages over 100,000 steps, but the run has 10,000"),
        ({"class_num": 2}, "all training images are of one of 2 classes"),
        ({"size": 16}, "4 of 4 images looked at are enlarged to 16 px"),
    ],
)  # fmt: skip
def test_what_is_probably_not_meant_is_said(tmp_path, given, said):
    images(tmp_path, random_values(4, 8))
    (fault,) = faults(tmp_path, **given)
    assert fault.startswith(said)


def test_black_images_are_found(tmp_path):
    images(tmp_path, torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
    (fault,) = faults(tmp_path)
    assert fault == f"3 of 3 images looked at are of one value, such as {tmp_path}/a/0.png"


def test_a_step_is_measured_up_to_its_batch_or_until_it_takes_long(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(plan.time, "perf_counter", lambda: now[0])
    sizes = []

    def step(images: int) -> None:
        sizes.append(images)
        now[0] += 0.1 * images

    assert plan.measure(step, 6) == pytest.approx(0.6)
    assert sizes == [1] * 4 + [2] * 4 + [4] * 4 + [6] * 4
    sizes.clear()
    assert plan.measure(step, 1000) == pytest.approx(100)
    assert max(sizes) == 16


def test_a_step_that_does_not_fit_is_measured_by_a_smaller_one():
    def step(images: int) -> None:
        if images > limit:
            raise torch.OutOfMemoryError

    limit = 2
    assert 0 < plan.measure(step, 1000) < 1
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        plan.measure(step, 1000)


def test_free_memory_is_known_on_the_host():
    assert 0 < plan.free_gib(torch.device("cpu")) < 10**5


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (720, "12 min"), (11520, "3.2 hours")])
def test_times_are_as_people_say_them(seconds, text):
    assert plan.duration(seconds) == text
