"""Probabilities by enumeration: they sum to 1 on every kind of grid, and the samplers pay what the likelihood says."""

from itertools import product

import pytest
import torch
from reference_model import Forced, ReferenceSampler

from conftest import grid_model
from models.likelihood.bits import draw_steps
from models.noise import VALUES
from models.sampling.options import steps_of_levels

QUIET = dict(num_orders=1, progress_bar=False)
# Channels, values, ordinal or categorical, generators above the head, sizes above the cell; and whether all arrays
# are enumerated, or all values of the cell that is decided last, given the others.
GRIDS = [
    (1, 2, "ordinal", "ar,ar", "8 4", "all arrays"),
    (1, 2, "categorical", "mar,mar", "2x2x2 1x2x1", "all arrays"),
    (1, 2, "ordinal", "ar,mar", "2x3 2x1", "all arrays"),
    (1, 2, "categorical", "mar,ar", "3x2 1x2", "all arrays"),
    (1, 2, "categorical", "mar,ar,mar", "8 4 2", "all arrays"),
    (1, 5, "categorical", "ar", "2x1x2", "all arrays"),
    (1, 5, "ordinal", "mar,mar", "4 2", "all arrays"),
    (1, 5, "categorical", "ar,mar", "2x2 1x2", "all arrays"),
    (1, 5, "ordinal", "mar,ar", "2x2x1 1x2x1", "all arrays"),
    (1, 256, "ordinal", "ar", "1x2", "all arrays"),
    (1, 256, "categorical", "mar", "3", "last cell"),
    (1, 256, "categorical", "ar,mar", "2x2x2 1x2x2", "last cell"),
    (1, 256, "ordinal", "mar,ar", "2x4 2x2", "last cell"),
    (2, 2, "categorical", "ar,ar", "2x3 2x1", "all arrays"),
    (2, 2, "ordinal", "mar,mar", "2x1x2 2x1x1", "all arrays"),
    (2, 2, "categorical", "mar,ar", "4 2", "all arrays"),
    (2, 2, "ordinal", "ar,mar", "2x2 2x1", "all arrays"),
    (2, 5, "ordinal", "ar", "1x1x2", "all arrays"),
    (2, 5, "categorical", "mar", "2", "all arrays"),
    (2, 5, "categorical", "ar,mar", "2x2x2 2x1x2", "last cell"),
    (2, 5, "ordinal", "mar,ar", "6x4 3x2", "last cell"),
    (2, 256, "ordinal", "mar", "2x1x1", "last cell"),
    (3, 2, "categorical", "ar,ar", "2x1x2 2x1x1", "all arrays"),
    (3, 2, "ordinal", "mar", "4", "all arrays"),
    (3, 2, "ordinal", "ar,mar", "2x2x2 1x1x2", "last cell"),
    (3, 2, "categorical", "mar,ar", "2x2x2 2x1x2", "last cell"),
    (3, 5, "categorical", "ar", "2", "all arrays"),
    (3, 5, "ordinal", "mar,mar", "2x4 2x2", "last cell"),
    (3, 5, "categorical", "ar,mar", "2x2x2 2x1x2", "last cell"),
    (3, 5, "ordinal", "mar,ar", "4 2", "last cell"),
    (4, 2, "ordinal", "ar", "3x1x1", "all arrays"),
    (4, 2, "categorical", "mar", "1x3", "all arrays"),
    (4, 2, "ordinal", "ar,mar", "2x2 1x2", "last cell"),
    (4, 2, "categorical", "mar,ar", "8 4", "last cell"),
    (4, 5, "categorical", "ar,mar", "8 4", "last cell"),
    (4, 5, "ordinal", "mar,ar", "2x2x4 1x2x2", "last cell"),
]
# Of these, only what the sampler pays is compared; tests/models/test_pixelloss.py sums the softmax of each channel.
TOO_MANY = [
    (2, 256, "categorical", "ar,ar", "4x2 2x2", "too many arrays"),
    (3, 256, "categorical", "mar,ar", "4 2", "too many arrays"),
    (4, 256, "ordinal", "ar,mar", "2x2x2 1x2x1", "too many arrays"),
]
STEPS = [(case, None) for case in GRIDS]  # a step for each patch
STEPS += [(case, 1) for case in GRIDS if "mar" in case[3] and case[1] < 256]
GUIDED = [
    (1, 3, "ordinal", "mar,mar", "4 2"),
    (1, 3, "ordinal", "ar,mar", "2x2 1x2"),
    (1, 3, "ordinal", "mar,mar", "2x1x2 2x1x1"),
    (2, 2, "ordinal", "ar,mar", "4 2"),
]
as_id = lambda case: " ".join(map(str, case)) if isinstance(case, tuple) else f"steps {case}"  # noqa: E731


def build(channels, num_values, value_kind, generators, sizes, what="", **changes):
    shapes = [tuple(map(int, size.split("x"))) for size in sizes.split()]
    shapes.append((1,) * len(shapes[0]))
    return grid_model(generators, shapes, channels, num_values, value_kind, **changes)


def values_of(model, n: int, seed: int = 0) -> torch.Tensor:
    """n arrays (n, C, *S) of random values."""
    shape, random = (n, model.alphabet.channels, *model.image_shape), torch.Generator().manual_seed(seed)
    return torch.randint(0, model.alphabet.num_values, shape, generator=random)


def every(num_values: int, places: int) -> torch.Tensor:
    """All arrays of so many values, (V ** places, places)."""
    return torch.cartesian_prod(*[torch.arange(num_values)] * places).view(-1, places)


def last_cell(model, steps) -> tuple[slice | int, ...]:
    """The index of the cell of one array that is decided last, in the orders of these steps."""
    row, corner = 0, [0] * len(model.image_shape)
    for generator, of_level in zip(model.generators, steps, strict=True):
        spec = generator.spec
        patch = spec.num_patches - 1 if of_level is None else of_level.order[row, -1].item()
        row = row * spec.num_patches + patch
        place = list(product(*map(range, spec.grid)))[patch]
        corner = [c + p * side for c, p, side in zip(corner, place, spec.patch_size, strict=True)]
    return (..., *corner)


def in_order(model, monkeypatch, index: int):
    """Makes a likelihood take the random numbers of the array `index`, and so its order, for all arrays."""
    noise = model.noise
    monkeypatch.setattr(model, "noise", lambda seed, indices: noise(seed, [index] * len(indices)))


@pytest.mark.parametrize(("case", "num_steps"), STEPS, ids=as_id)
def test_probabilities_sum_to_one(case, num_steps, monkeypatch):
    """AR: p(x). MAR: p(x | order), for the order of one index, in one step or in as many as there are patches."""
    model = build(*case)
    channels, num_values, *_, what = case
    in_order(model, monkeypatch, index=3)
    if what == "all arrays":
        arrays = every(num_values, model.num_dims).view(-1, channels, *model.image_shape)
    else:
        values = every(num_values, channels)
        arrays = values_of(model, 1).repeat(len(values), *[1] * (1 + len(model.image_shape)))
        last = last_cell(model, draw_steps(model, model.noise(0, [0]), steps_of_levels(model, num_steps)))
        arrays[last] = values
    bits = model.log_likelihood(arrays, reduce="pixel", num_inference_steps=num_steps, **QUIET).bits
    if what == "last cell":
        others = torch.ones(model.image_shape, dtype=torch.bool)
        others[last] = False
        assert bits[:, others].std(0).max() < 1e-4  # the last cell changes nothing before it
        bits = bits[last]
    bits = bits.flatten(1).sum(1) if bits.dim() > 1 else bits
    assert bits.exp2().sum().item() == pytest.approx(1, abs=2e-5)
    assert bits.std() > 0.1  # equal probabilities would sum to 1 too


@pytest.mark.parametrize("case", GUIDED, ids=as_id)
def test_probabilities_of_arrays_and_guiding_pixels_sum_to_one(case, monkeypatch):
    """The sampler draws every array under every guiding pixel. The likelihood counts the array's own one only."""
    model = build(*case, guiding_pixel=True)
    in_order(model, monkeypatch, index=3)
    channels, num_values, num_patches = *case[:2], model.generator.spec.num_patches
    arrays = every(num_values, model.num_dims).view(-1, channels, *model.image_shape)
    guides = every(num_values, channels * num_patches)
    forced = Forced(model, arrays.repeat_interleave(len(guides), dim=0))
    numbers = forced.noise.maps[1][:, VALUES]
    wanted = ((guides + 0.5) / num_values).repeat(len(arrays), 1).view(numbers.shape)
    own = (numbers == wanted).flatten(1).all(1)
    numbers.copy_(wanted)
    conds = [model.fake_latent.repeat(len(wanted), 1)] * model.num_conds
    model.sample(conds, model.sampling_defaults.num_inference_steps, noise=forced.noise, pick=forced)
    paid = forced.bits_of_each
    assert paid.neg().exp2().sum().item() == pytest.approx(1, abs=2e-5)
    bits = model.log_likelihood(arrays, **QUIET).bits
    torch.testing.assert_close(bits, -paid[own], rtol=1e-4, atol=1e-4)
    assert bits.exp2().sum() < 0.99  # p(x) >= p(x, its guiding pixels)
    assert bits.std() > 0.1


@pytest.mark.parametrize("case", [*GRIDS, *TOO_MANY, *((*case, "guided") for case in GUIDED)], ids=as_id)
def test_the_likelihood_is_what_the_samplers_pay(case):
    """The sampler and the reference implementation are made to draw arrays."""
    model = build(*case, guiding_pixel=case[-1] == "guided")
    arrays, steps = values_of(model, 3), (2,) * len(model.generators)
    slow, fast = Forced(model, arrays, seed=7), Forced(model, arrays, seed=7)
    drawn = ReferenceSampler(model, steps, 1.0, pick=slow).sample(None, slow.noise)
    assert torch.equal(model.alphabet.to_values(drawn), arrays)
    conds = [model.fake_latent.repeat(3, 1)] * model.num_conds
    drawn = model.sample(conds, steps, noise=fast.noise, pick=fast)
    assert torch.equal(model.alphabet.to_values(drawn), arrays)
    found = model.log_likelihood(arrays, num_inference_steps=steps, seed=7, **QUIET).bits
    torch.testing.assert_close(-fast.bits_of_each, found, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(-slow.bits_of_each, found, rtol=1e-4, atol=1e-4)
