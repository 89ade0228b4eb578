"""Models of arrays on any grid, of any alphabet: trained, sampled, edited, measured and saved.

tests/models/likelihood/test_enumeration.py enumerates their probabilities, tests/models/sampling/test_canvas.py
compares their samplers with the reference implementation.
"""

import numpy as np
import pytest
import torch
from reference_model import Forced, ReferenceSampler

from conftest import GRID_MODELS, grid_model
from models.fractalgen import FractalGen
from models.likelihood.inside import look_inside
from util.errors import UserError

QUIET = dict(progress_bar=False)
MODELS = {
    **GRID_MODELS,
    "a volume of categories": ("mar,mar", [(2, 4, 2), (1, 2, 2), (1, 1, 1)], 1, 5, "categorical"),
}


def arrays_of(model, n: int, missing: int = 0) -> torch.Tensor:
    """n arrays (n, C, *S) of random values, without the `missing` last ones."""
    shape, random = (n, model.alphabet.channels, *model.image_shape), torch.Generator().manual_seed(0)
    return torch.randint(0, model.alphabet.num_values - missing, shape, generator=random)


def numpy(values: torch.Tensor) -> np.ndarray:
    return values.movedim(1, -1).numpy()


def bits_of(model, arrays: torch.Tensor, *labels, **options) -> torch.Tensor:
    return model.log_likelihood(arrays, *labels, **options, **QUIET).bits


@pytest.fixture(params=MODELS)
def model(request) -> FractalGen:
    return grid_model(*MODELS[request.param])


def test_an_array_depends_on_its_seed_and_index_alone(model):
    settings = dict(seed=4, output_type="np", guidance_scale=2.0, temperature=0.5, **QUIET)
    six = model.generate([0, 1, 2, 3, 0, 1], **settings)
    assert six.shape == (6, *model.image_shape, model.alphabet.channels)
    assert six.max() < model.alphabet.num_values
    assert six.dtype == (np.uint8 if model.alphabet.num_values <= 256 else np.uint16)
    assert (model.generate([0], indices=[4], **settings)[0] == six[4]).all()
    assert (model.generate([3, 2, 1], indices=[3, 2, 1], chunk=2, **settings) == six[3:0:-1]).all()
    assert (six[0] != six[4]).any()  # of the same class
    assert (model.generate([0] * 6, **{**settings, "seed": 5}) != six).any()


def test_gradients_reach_every_weight(model):
    model.train()
    arrays = arrays_of(model, 6, missing=1)
    masks = model.draw_masks(model.noise(0, range(6)), train=True)
    label_drop = torch.tensor([True] + [False] * 5)
    images, labels = model.alphabet.normalize(arrays), torch.tensor([0, 1, 2, 3, 0, 1])
    model(images, labels, masks=masks, label_drop=label_drop).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.any(), name
        if name.endswith("patch_emb.table.weight"):  # a value that no array holds has no gradient
            of_channel = weight.grad.unflatten(0, (model.alphabet.channels, -1)).any(-1)
            assert not of_channel[:, -1].any()
            assert of_channel[:, :-1].any(1).all()
        if "codebook" in name:  # as a weight of the logits, also the row of a value that no array holds
            assert weight.grad.any(-1).all(), name


def test_known_cells_come_back_to_the_bit(model):
    arrays = arrays_of(model, 2)
    mask = torch.rand(model.image_shape, generator=torch.Generator().manual_seed(1)) < 0.4
    out = model.edit(arrays, mask, [1, 2], seed=0, output_type="np", **QUIET)
    assert (out == numpy(arrays))[:, ~mask.numpy()].all()
    assert (out != numpy(arrays))[:, mask.numpy()].any()
    assert (model.edit(numpy(arrays), mask.numpy(), [1, 2], seed=0, output_type="np", **QUIET) == out).all()


def test_boxes_and_places_have_as_many_axes_as_the_model(model):
    arrays, axes = arrays_of(model, 1), len(model.image_shape)
    options = dict(seed=0, output_type="np", **QUIET)
    corner, sides = (1, 0, 1)[:axes], (1, 2, 1)[:axes]
    inside = tuple(slice(a, a + b) for a, b in zip(corner, sides, strict=True))
    said = corner[::-1] + sides[::-1] if axes == 2 else corner + sides  # (x, y, width, height)
    kept = numpy(arrays)[(0, *inside)]
    out = model.outpaint(arrays, said, 1, **options)
    assert (out[(0, *inside)] == kept).all()
    assert (model.uncrop(arrays[(..., *inside)], said[:axes], 1, **options) == out).all()
    changed = model.edit_class(arrays, said, 2, **options) != numpy(arrays)
    changed[(0, *inside)] = False
    assert not changed.any()


def test_reductions_sum_to_the_bits_of_the_array(model):
    arrays, (channels, shape) = arrays_of(model, 3), (model.alphabet.channels, model.image_shape)
    bits = bits_of(model, arrays)
    for reduce, size in {"pixel": shape, "channel": (channels,), "level": (2,)}.items():
        parts = bits_of(model, arrays, reduce=reduce)
        assert parts.shape == (3, *size)
        torch.testing.assert_close(parts.flatten(1).sum(1), bits)


def test_a_look_inside_finds_what_the_likelihood_finds(model):
    array, cell = arrays_of(model, 1), tuple(side // 2 for side in model.image_shape)
    said = cell[::-1] if len(cell) == 2 else cell  # x, y
    inside = look_inside(model, array, said, seed=3)
    last = inside.places[-1]
    assert last.values.tolist() == array[(0, slice(None), *cell)].tolist()
    assert last.probs.shape == (model.alphabet.channels, model.alphabet.num_values)
    assert last.known.shape == model.generators[-1].spec.img_size
    assert not last.known[tuple(place % side for place, side in zip(cell, last.known.shape, strict=True))]
    bits = bits_of(model, array, reduce="pixel", num_orders=1, seed=3)[(0, *cell)]
    found = last.probs.gather(1, last.values[:, None]).log2().sum()
    assert found.item() == pytest.approx(bits.item(), rel=1e-4, abs=1e-4)


def test_a_model_is_saved_with_its_alphabet(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, arrays = FractalGen.from_pretrained(tmp_path), arrays_of(model, 2)
    assert loaded.alphabet == model.alphabet
    assert loaded.image_shape == model.image_shape
    assert loaded.config == model.config
    assert torch.equal(bits_of(loaded, arrays), bits_of(model, arrays))


def test_mean_and_std_are_the_models_own_and_saved(tmp_path):
    model = grid_model(*MODELS["a volume"], mean=[0.1, 0.7], std=(0.5, 0.125))
    plain, arrays = grid_model(*MODELS["a volume"]), arrays_of(model, 2)
    assert (bits_of(model, arrays) - bits_of(plain, arrays)).abs().min() > 0.1
    model.save_pretrained(tmp_path)
    loaded = FractalGen.from_pretrained(tmp_path)
    assert (loaded.alphabet.mean, loaded.alphabet.std) == ((0.1, 0.7), (0.5, 0.125))
    assert torch.equal(bits_of(loaded, arrays), bits_of(model, arrays))
    torch.testing.assert_close(loaded.alphabet.normalize(arrays)[:, 1], (arrays[:, 1] / 299 - 0.7) / 0.125)
    forced = Forced(model, arrays)  # every level has them: what is drawn is what the likelihood is of
    drawn = model.sample([model.fake_latent.repeat(2, 1)], (8, 6), noise=forced.noise, pick=forced)
    torch.testing.assert_close(drawn, model.alphabet.normalize(arrays))
    torch.testing.assert_close(-forced.bits_of_each, bits_of(model, arrays), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["a grey rectangle", "a volume"])
def test_a_few_steps_of_training_lower_the_loss_and_the_likelihood_is_the_product_of_softmaxes(name):
    model = grid_model(*MODELS[name]).train()
    low = arrays_of(model, 8) // 4  # what is to be learned: no value is high
    images, labels = model.alphabet.normalize(low), torch.zeros(8, dtype=torch.long)
    masks = model.draw_masks(model.noise(0, range(8)), train=True)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(model(images, labels, masks=masks))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    drawn = model.generate([0] * 4, seed=0, output_type="pt", **QUIET)
    values = model.alphabet.to_values(drawn)
    torch.testing.assert_close(model.alphabet.normalize(values), drawn)
    mask = torch.zeros(model.image_shape, dtype=torch.bool)
    mask[..., 1:] = True
    edited = model.edit(values, mask, 0, seed=1, output_type="np", **QUIET)
    assert (edited == numpy(values))[:, ~mask.numpy()].all()
    forced = Forced(model, low)  # each softmax by itself, by the reference implementation
    ReferenceSampler(model, (100, 100), 1.0, pick=forced).sample(labels, forced.noise)
    bits = bits_of(model, low, 0, num_orders=1)
    torch.testing.assert_close(-forced.bits_of_each, bits, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value_kind", ["ordinal", "categorical"])
def test_65536_values(value_kind):
    model = grid_model("ar", [(4,), (1,)], 1, 2**16, value_kind, num_blocks_list=[1, 1])
    arrays = torch.tensor([[[0, 2**16 - 1, 40_000, 31_111]]])
    before = bits_of(model, arrays, reduce="pixel")
    drawn = model.generate([0, 1], seed=0, **QUIET)
    assert drawn.dtype == np.uint16
    assert drawn.max() > 2**15
    forced = Forced(model, arrays)
    model.sample([model.fake_latent], (4,), noise=forced.noise, pick=forced)
    assert bits_of(model, arrays).item() == pytest.approx(-forced.bits, rel=1e-5)
    mask = torch.tensor([False, False, False, True])
    out = model.edit(numpy(arrays).astype(np.uint16), mask, 0, seed=0, **QUIET)
    assert out[0, :3, 0].tolist() == [0, 65_535, 40_000]
    arrays[0, 0, 1] -= 1  # a neighbouring value is another one to the cells that follow
    after = bits_of(model, arrays, reduce="pixel")
    assert (after != before)[0, 1:].all()


@pytest.mark.parametrize("value_kind", ["ordinal", "categorical"])
def test_bfloat16_weights_keep_every_known_value(value_kind):
    model = grid_model("mar,ar", [(4, 100), (2, 10), (1, 1)], 1, 300, value_kind).bfloat16()
    array = torch.arange(400).view(1, 1, 4, 100) % 300
    mask = torch.zeros(4, 100, dtype=torch.bool)
    mask[1, 7] = True
    out = model.edit(array, mask, 0, seed=0, output_type="np", **QUIET)
    assert (out == numpy(array))[:, ~mask.numpy()].all()
    embedding = model.generator.patch_emb  # and the transformer tells neighbouring values apart
    cells = model.alphabet.normalize(torch.arange(256, 300).view(-1, 1, 1)).expand(-1, -1, 20)
    inputs = embedding.inputs(cells.flatten(1)).flatten(1)
    assert len(inputs.unique(dim=0)) == 44


def test_names_of_weights_follow_the_channels():
    for channels, expected in {1: ["c0"], 3: ["r", "g", "b"], 4: ["c0", "c1", "c2", "c3"]}.items():
        names = list(grid_model("ar", [(2,), (1,)], channels, 5, "categorical").state_dict())
        head = [f"next_fractal.{name}_codebook.weight" for name in expected]
        assert [name for name in names if "codebook" in name] == head
        biases = [f"next_fractal.{name}_mlm.bias" for name in expected]
        assert [name for name in names if "mlm" in name] == biases
        assert "generator.patch_emb.table.weight" in names


def test_values_that_a_model_does_not_have_are_refused(model):
    arrays = arrays_of(model, 1)
    arrays.view(-1)[3] = model.alphabet.num_values
    with pytest.raises(UserError, match=f"give integers 0 to {model.alphabet.num_values - 1}"):
        bits_of(model, arrays)
    with pytest.raises(UserError, match="image of"):
        bits_of(model, arrays_of(model, 1)[..., :-1])
