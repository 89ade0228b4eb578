"""Edits draw from the exact conditional of the hidden cells, where it can be enumerated: chi-square on 10,000 draws.

An AR level looks at what is before a cell, so all hidden cells come last. A MAR level draws an order for each image:
the conditional is the mean over all orders of the hidden cells. Guiding pixels are left out: how they are drawn for a
partly known patch is a heuristic (`KnownPixels.guiding_weights`).
"""

from collections.abc import Callable, Sequence
from itertools import permutations, product
from math import prod

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from conftest import grid_model
from models.generator import Steps
from models.patches import patchify

DRAWS, SIGNIFICANT = 10_000, 1e-3
# Generators above the head, sizes, channels, values, ordinal or categorical; the numbers of the hidden cells
CASES = {
    "ar, one axis, categorical": ("ar,ar", [(4,), (2,), (1,)], 1, 3, "categorical", [1, 2, 3]),
    "ar, three axes, ordinal": ("ar,ar", [(2, 2, 2), (1, 2, 1), (1, 1, 1)], 2, 2, "ordinal", [5, 7]),
    "mar, one axis, categorical": ("mar", [(4,), (1,)], 1, 5, "categorical", [1, 2]),
    "mar, three axes, ordinal": ("mar", [(2, 1, 2), (1, 1, 1)], 2, 2, "ordinal", [0, 3]),
    "mar over ar, one axis, ordinal": ("mar,ar", [(6,), (3,), (1,)], 1, 4, "ordinal", [1, 2]),
    "mar over mar, two axes, categorical": ("mar,mar", [(2, 4), (2, 2), (1, 1)], 1, 4, "categorical", [2, 7]),
    "mar below ar, three axes, ordinal": (
        "ar,mar",
        [(2, 2, 2), (1, 2, 2), (1, 1, 1)],
        2,
        2,
        "ordinal",
        [5, 6],
    ),
}


def completions(values: torch.Tensor, num_values: int, cells: list[int]) -> torch.Tensor:
    """The array `values` (C, *S) with all values of the hidden `cells`: (V ** (C * cells), C, *S)."""
    channels = len(values)
    every = torch.tensor(list(product(range(num_values), repeat=channels * len(cells))))
    arrays = values.repeat(len(every), *[1] * values.dim()).flatten(2)
    arrays[:, :, cells] = every.view(-1, channels, len(cells))
    return arrays.view(-1, *values.shape)


def ending_with(num_patches: int, last: Sequence[int]) -> Callable:
    """A `draw_steps` that decides the patches `last` after all others, and one patch in a step."""
    order = torch.tensor([*(patch for patch in range(num_patches) if patch not in last), *last])
    plan = tuple((place, place + 1) for place in range(num_patches))
    return lambda noise, num_iter: Steps(order.expand(len(noise), -1), plan)


def conditional(model, arrays: torch.Tensor, cells: list[int], monkeypatch) -> np.ndarray:
    """p(hidden cells | known cells) of the completions `arrays`, from likelihoods: the mean over the orders.

    If there is a MAR level, the hidden cells lie in one image of the last level, which is decided last.
    """
    *above, generator = model.generators
    numbers = torch.arange(prod(model.image_shape)).view(1, 1, *model.image_shape)
    images = patchify(numbers, generator.spec.img_size)[0].tolist()
    (image,) = [number for number, inside in enumerate(images) if cells[0] in inside]
    inside, found = [images[image].index(cell) for cell in cells if cell in images[image]], []
    for hidden in permutations(inside) if not generator.exact_likelihood else [inside]:
        for level, last in (*((level, [image]) for level in above), (generator, hidden)):
            if not level.exact_likelihood:
                monkeypatch.setattr(level, "draw_steps", ending_with(level.spec.num_patches, last))
        bits = model.log_likelihood(arrays, reduce="pixel", num_orders=1, progress_bar=False).bits
        found.append(bits.flatten(1)[:, cells].sum(1).exp2())
        assert found[-1].sum().item() == pytest.approx(1, abs=1e-5)
    monkeypatch.undo()
    return torch.stack(found).mean(0).numpy()


def p_value(counts: np.ndarray, probs: np.ndarray) -> float:
    """Of Pearson's chi-square test; completions that are expected less than five times are counted together."""
    expected = probs / probs.sum() * counts.sum()
    often = expected >= 5
    counts, expected = (np.append(x[often], x[~often].sum()) for x in (counts, expected))
    keep = expected > 0
    return chisquare(counts[keep], expected[keep]).pvalue


@pytest.mark.parametrize("case", CASES)
def test_hidden_cells_follow_their_exact_conditional(case, monkeypatch):
    generators, sizes, channels, num_values, value_kind, cells = CASES[case]
    # One condition is one token: with more, the known cells weigh less, and their conditionals are more alike.
    model = grid_model(generators, sizes, channels, num_values, value_kind, num_conds=1)
    values = torch.zeros(channels, *sizes[0], dtype=torch.long)
    arrays = completions(values, num_values, cells)
    mask = torch.zeros(prod(sizes[0]), dtype=torch.bool)
    mask[cells] = True
    options = dict(num_results=DRAWS, seed=0, output_type="pt", progress_bar=False)
    drawn = model.edit(values, mask.view(sizes[0]), **options)
    drawn = model.alphabet.to_values(drawn).flatten(1)
    counts = np.array([(drawn == array).all(1).sum().item() for array in arrays.flatten(1)])
    assert counts.sum() == DRAWS  # so all known cells are kept
    assert p_value(counts, conditional(model, arrays, cells, monkeypatch)) > SIGNIFICANT
    others = completions(values + num_values - 1, num_values, cells)  # given other cells
    assert p_value(counts, conditional(model, others, cells, monkeypatch)) < SIGNIFICANT
