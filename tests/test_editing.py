"""Edits: known pixels to the bit, hidden ones as `generate` draws them, for every kind of model and odd masks."""

import numpy as np
import pytest
import torch

from conftest import opinionated, random_levels, tiny_model

QUIET = dict(progress_bar=False, output_type="np", seed=3)


def numpy(levels: torch.Tensor) -> np.ndarray:
    return levels.permute(0, 2, 3, 1).numpy()


def box(*rows_columns: slice, side: int = 8) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[rows_columns] = True
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


def test_all_hidden_is_generate_and_nothing_hidden_comes_back_at_once(kind, monkeypatch):
    model, image = opinionated(tiny_model(kind)), numpy(random_levels(2, 8))
    drawn = model.generate([1, 2], guidance_scale=2.0, **QUIET)
    assert (model.edit(image, np.ones((8, 8)), [1, 2], guidance_scale=2.0, **QUIET) == drawn).all()
    monkeypatch.setattr(type(model.generator), "sampler", lambda self, child, setup: None)  # nothing to sample with
    assert (model.edit(image, np.zeros((8, 8)), [1, 2], guidance_scale=2.0, **QUIET) == image).all()
