"""The sampler equals the reference implementation in tests/reference_model.py, and takes few operations."""

import traceback

import pytest
import torch
from opcount import OpCount
from reference_model import ReferenceSampler
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ROOT, TINY, grid_model, opinionated, tiny_model
from models import fractalgen
from models.fractalgen import FractalGen
from models.sampling import prepare
from models.sampling.prepare import FastLinear

LABELS = torch.tensor([0, 1, 2, 3, 0])
STEPS = (5, 3)


class Picks:
    """Picks values that depend on the uniforms only, and stores the probabilities.

    So rounding of the probabilities changes no image.
    """

    def __init__(self):
        self.uniforms, self.probs = [], []

    def __call__(self, probs, uniforms):
        self.uniforms.append(uniforms)
        self.probs.append(probs)
        return (uniforms * probs.shape[1]).long()

    def sorted(self):
        return torch.cat(self.probs)[torch.cat(self.uniforms).argsort()]


def assert_like_the_reference(model, scale=3.0, schedule="linear", steps=STEPS, atol=1e-5, **how):
    """Asserts that the sampler's distributions equal those of the reference. Returns the images."""
    noise, settings = (
        model.noise(3, range(len(LABELS))),
        (steps, scale, schedule, 1.1, 1e-2),
    )
    reference_picks, picks = Picks(), Picks()
    reference = ReferenceSampler(model, *settings, pick=reference_picks).sample(LABELS, noise)
    cond = model.class_emb(LABELS)
    cond = torch.cat([cond, model.fake_latent.repeat(len(LABELS), 1)]) if scale != 1 else cond
    images = model.sample([cond] * model.num_conds, *settings, noise=noise, pick=picks, **how)
    torch.testing.assert_close(picks.sorted(), reference_picks.sorted(), rtol=1e-4, atol=atol)
    torch.testing.assert_close(images, reference)
    return images


@pytest.mark.parametrize(("scale", "schedule"), [(1.0, "linear"), (3.0, "linear"), (2.0, "constant")])
def test_distributions_equal_those_of_the_reference(kind, scale, schedule):
    assert_like_the_reference(opinionated(tiny_model(kind)), scale, schedule)


@pytest.mark.parametrize("steps", [(1, 1), (2, 2), (16, 4)])
def test_any_number_of_steps(kind, steps):
    assert_like_the_reference(opinionated(tiny_model(kind)), steps=steps)


@pytest.mark.parametrize("generators", [["mar", "mar", "mar", "ar"], ["mar", "ar", "mar", "ar"]])
def test_deeper_fractals_with_guiding_pixels(generators):
    changes = dict(img_size_list=[16, 8, 2, 1], embed_dim_list=[32, 32, 16, 16], num_blocks_list=[1, 2, 1, 2])
    changes |= dict(
        num_heads_list=[2, 2, 2, 2],
        generator_type_list=generators,
        num_conds=1 if "ar" in generators[:-1] else 5,
    )
    model = opinionated(tiny_model("guided", **changes))
    assert_like_the_reference(model, steps=(3, 4, 3))


OTHERS = {  # generators above the head, sizes, channels, values
    "a sequence": ("mar,ar", [(12,), (3,), (1,)], 4, 20, "categorical"),
    "a grey rectangle": ("mar,mar", [(4, 6), (2, 3), (1, 1)], 1, 17, "ordinal"),
    "a volume": ("ar,mar", [(4, 2, 6), (2, 1, 3), (1, 1, 1)], 2, 300, "ordinal"),
    "a volume of categories": ("mar,mar", [(2, 4, 2), (1, 2, 2), (1, 1, 1)], 1, 5, "categorical"),
    "a rectangle of categories": ("ar,ar", [(6, 4), (2, 2), (1, 1)], 6, 2, "categorical"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_grids_and_alphabets(name):
    for guiding_pixel in {False, OTHERS[name][-1] == "ordinal"}:
        blocks = dict(num_blocks_list=[2, 1, 2])
        assert_like_the_reference(grid_model(*OTHERS[name], guiding_pixel=guiding_pixel, **blocks))


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_change_no_image(kind, chunk):
    assert_like_the_reference(opinionated(tiny_model(kind)), chunk=chunk)


def test_chunks_limit_how_many_patches_are_drawn_together(monkeypatch):
    from models.sampling.mar import MARSampler

    sizes, predict = [], MARSampler.predict
    monkeypatch.setattr(
        MARSampler,
        "predict",
        lambda self, state, *args: sizes.append(len(state.order)) or predict(self, state, *args),
    )
    assert_like_the_reference(tiny_model("mar"), chunk=2)
    assert set(sizes) == {5, 2, 1}  # level 0 draws all five images at once


def test_cached_token_groups_change_no_image(monkeypatch):
    monkeypatch.setattr("models.sampling.mar.MAX_CACHED_TOKENS", 30)
    assert_like_the_reference(opinionated(tiny_model("mar")))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "fallback"])
def test_packed_weights_and_their_fallback_give_the_same(kind, packed, monkeypatch):
    monkeypatch.setattr(prepare, "MIN_PACKED_WEIGHTS", 0)
    monkeypatch.setattr(prepare, "packed_rows", lambda dtype: prepare.ALL_ROWS if packed else prepare.NO_ROWS)
    calls, run = [], FastLinear.pack
    monkeypatch.setattr(FastLinear, "pack", lambda self, *args: calls.append(0) or run(self, *args))
    assert_like_the_reference(opinionated(tiny_model(kind)))
    assert bool(calls) == packed


def test_without_onednn_nothing_is_packed(monkeypatch):
    monkeypatch.delattr(torch.ops.mkldnn, "_linear_pointwise")
    monkeypatch.setattr(
        type(torch.ops.mkldnn), "__getattr__", lambda self, name: object.__getattribute__(self, name)
    )
    prepare.packed_rows.cache_clear()
    assert prepare.packed_rows(torch.float32) == prepare.NO_ROWS
    prepare.packed_rows.cache_clear()


def test_bfloat16_distributions_stay_close(kind):
    model, met = opinionated(tiny_model(kind)), {}
    for name, enabled in (("exact", False), ("rough", True)):
        met[name] = Picks()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            conds = [model.fake_latent.repeat(4, 1)] * model.num_conds
            model.sample(conds, STEPS, pick=met[name], noise=model.noise(0, range(4)))
    distance = (met["exact"].sorted() - met["rough"].sorted()).abs().sum(-1) / 2  # total variation
    assert 0 < distance.mean() < 0.05


class FirstProducts(TorchDispatchMode):
    """Notes how many frames of the library lie above each matrix product, by whether sampling has begun."""

    def __init__(self):
        super().__init__()
        self.depths = {"prepare": [], "sample": []}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "_linear_pointwise"):
            frames = [f.name for f in traceback.extract_stack() if f.filename.startswith(f"{ROOT}/models/")]
            names = [name for name in frames if name != "<listcomp>"]  # none since Python 3.12
            self.depths["sample" if "draw" in names else "prepare"].append(len(names))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["ar", "mar", "guided"])
def test_at_most_six_frames_lie_between_generate_and_the_first_matrix_product(kind):
    model = tiny_model(kind)
    with FirstProducts() as products:
        model.generate([0], num_inference_steps=(1, 1), guidance_scale=2.0, seed=0, progress_bar=False)
    assert products.depths["prepare"][0] <= 6
    assert products.depths["sample"][0] <= 6


def test_images_are_ordinary_tensors():
    model = tiny_model("mar")
    images = model.sample([model.fake_latent] * 5, STEPS)
    assert not images.is_inference()
    model(images, torch.tensor([0])).backward()  # autograd cannot save inference tensors


# `published` is how many operations the published implementation dispatches for one image with guidance.
@pytest.mark.parametrize(
    ("name", "published"),
    [("fractalmar_in64", 599_000), ("fractalar_in64", 3_380_000), ("fractalmar_huge_in256", 6_570_000)],
)
def test_an_image_takes_few_operations_and_no_waiting(name, published, monkeypatch):
    """Counts the operations of a narrow model with the preset's depth, sizes and steps.

    Only a `share` of level 0's steps is run; all of them take equally many operations. Without inference
    mode, the counter also sees the operations that composite operations consist of, such as copies.
    """
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    preset, share = fractalgen.PRESETS[name], 1 / 32
    widths = [8 * heads for heads in preset.heads]
    model = FractalGen(preset.sizes, widths, preset.blocks, preset.heads, preset.generators,
                       num_conds=preset.num_conds, guiding_pixel=preset.guiding_pixel).eval()  # fmt: skip
    conds = [torch.cat([model.class_emb(torch.tensor([1])), model.fake_latent])] * model.num_conds

    class Enough(Exception):
        pass

    def stop(step, num_steps, canvas):
        if (step + 1) / num_steps >= share:
            raise Enough

    with OpCount() as ops, pytest.raises(Enough):
        model.sample(conds, preset.steps, 4.0, on_step=stop, noise=model.noise(0, [0]))
    assert ops.total / share < 0.45 * published
    assert not ops.syncs


def test_the_counter_sees_operations_that_wait_for_the_device():
    x = torch.arange(4.0)
    with OpCount() as ops:
        x.sum().item()
        x[x > 1]
        (x > 1).nonzero()
        x[torch.tensor([1, 2])]
        x.tolist()
    assert ops.syncs == {"_local_scalar_dense": 1, "index": 1, "nonzero": 1, "tolist": 1}


def test_kinds_are_all_covered():
    assert {name for preset in TINY.values() for name in preset["generator_type_list"]} == set(
        fractalgen.GENERATORS
    )
