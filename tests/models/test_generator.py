"""The contract of a generator type, tested with the one that demo/custom_generator.py registers."""

import importlib
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT, random_values, tiny_model
from evaluation.cost import forward_cost
from models.generator import GENERATORS, ForwardOptions, Generator, Mask, register_generator
from models.patches import patchify
from util.pixels import RGB


@pytest.fixture
def independent():
    """Registers the type of demo/custom_generator.py, which predicts all patches from the condition."""
    sys.modules.pop("custom_generator", None)
    custom_generator = importlib.import_module("custom_generator")
    yield custom_generator.Independent
    del GENERATORS["independent"]


def test_the_example_of_a_generator_type_has_thirty_lines_at_most():
    assert len((ROOT / "demo" / "custom_generator.py").read_text().splitlines()) <= 30


def test_a_registered_type_trains_and_samples(independent):
    model = tiny_model("mar", generator_type_list=["mar", "independent", "ar"], num_conds=5).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, labels = RGB.normalize(torch.full((8, 3, 8, 8), 40)), torch.zeros(8, dtype=torch.long)
    losses = []
    for _ in range(40):
        losses.append(model(images, labels))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    drawn = model.generate([0, 1], guidance_scale=2.0, seed=0, output_type="np", progress_bar=False)
    assert drawn.shape == (2, 8, 8, 3)


def test_a_type_that_takes_one_condition_may_follow_one_that_gives_one(independent):
    kinds = ["ar", "independent", "ar"]
    model = tiny_model("mar", generator_type_list=kinds, num_conds=5)
    assert model(RGB.normalize(random_values(2, 8)), torch.zeros(2, dtype=torch.long)).isfinite()
    with pytest.raises(ValueError, match="level 1: num_conds 5, but the independent level above gives 1"):
        tiny_model("mar", generator_type_list=["independent", "mar", "ar"], num_conds=5)


def test_the_cost_report_says_what_a_type_lacks(independent):
    with pytest.raises(NotImplementedError, match=r"Independent.run, which the cost report measures"):
        forward_cost(tiny_model("mar", generator_type_list=["mar", "independent", "ar"]).to("meta"))


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'mar' is registered already"):
        register_generator("mar", num_conds_out=5)(Generator)


def test_mask_of_counts_masks_that_many_patches_and_knows_their_numbers():
    counts = np.array([1, 3, 4])
    order = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    mask = Mask.of_counts(counts, order)
    assert mask.masked.int().tolist() == [[0, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert mask.rows.tolist() == [1, 4, 5, 6, 8, 9, 10, 11]
    again = Mask.of(mask.masked)
    assert torch.equal(again.rows, mask.rows)


def test_an_unmasked_patch_reaches_nothing_below(kind):
    """A MAR generator passes down conditions and images of its masked patches only, in row-major order."""
    model = tiny_model(kind)
    generator = model.generators[0]
    images = RGB.normalize(random_values(3, 8))
    mask = Mask.of(torch.rand(3, 16) < 0.5)
    output = generator(
        images,
        model.conditions(torch.zeros(3, dtype=torch.long), torch.zeros(3).bool()),
        ForwardOptions([mask] * 2),
    )
    every = patchify(images, (2, 2)).flatten(0, 1)
    expected = every[mask.rows] if kind not in ("ar", "ar over mar") else every
    assert torch.equal(output.images.flatten(1), expected)
    assert all(len(cond) == len(expected) for cond in output.conds)
