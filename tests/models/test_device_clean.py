"""Forward and backward passes and sampling compute on the data's device and never wait for it.

Fake CUDA tensors need no GPU. To mix them with a CPU tensor raises, and so does reading a value.
"""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from conftest import grid_model, tiny_model
from models import fractalgen
from models.fractalgen import FractalGen
from models.sampling import generate

# The larger ones differ in widths and blocks only.
PUBLISHED = [
    pytest.param(name, marks=[pytest.mark.slow] if "large" in name or "huge" in name else [])
    for name in fractalgen.PRESETS
    if "tiny" not in name
]


def published(name: str, blocks: int = 2, size: int | None = None) -> FractalGen:
    """Builds a published architecture with `blocks` blocks a level, for images of `size` x `size` pixels."""
    preset = fractalgen.PRESETS[name]
    sizes = [size or preset.sizes[0], *preset.sizes[1:]]
    return FractalGen(sizes, preset.widths, [blocks] * len(sizes), preset.heads, preset.generators,
                      num_conds=preset.num_conds, guiding_pixel=preset.guiding_pixel)  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("train", [True, False])
def test_forward_on_fake_cuda(name, train):
    with FakeTensorMode(), torch.device("cuda"):
        model = published(name).train(train)
        size = model.img_size_list[0]
        loss, terms = model(
            torch.empty(1, 3, size, size), torch.empty(1, dtype=torch.long), return_terms=True
        )
        assert loss.device.type == "cuda"
        assert all(term.nll.device.type == "cuda" and term.nll.dtype == torch.float32 for term in terms)


@pytest.mark.parametrize("name", PUBLISHED)
def test_backward_on_meta(name):
    with torch.device("meta"):
        model = published(name).train()
        size = model.img_size_list[0]
        model(torch.empty(1, 3, size, size), torch.empty(1, dtype=torch.long)).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_sampling_on_fake_cuda(name, monkeypatch):
    """With one block per level and few steps or patches, every line of code runs within seconds.

    Only the check after the last step, whether the images are finite, reads a value.
    """
    monkeypatch.setattr(generate, "check_finite", lambda *arguments: None)
    with FakeTensorMode(), torch.device("cuda"):
        # An AR level takes a step for every patch, so level 0 gets only four patches.
        model = published(name, blocks=1, size=8 if name.startswith("fractalar") else None)
        steps = [2] * len(model.generators)
        drawn = model.generate(
            [1, 2],
            num_inference_steps=steps,
            guidance_scale=4.0,
            seed=0,
            output_type="pt",
            progress_bar=False,
        )
    assert drawn.device.type == "cuda"
    assert drawn.shape == (2, 3, model.img_size_list[0], model.img_size_list[0])


OTHERS = {
    "a sequence": ("mar,ar", [(4,), (2,), (1,)], 4, 20, "categorical"),
    "a volume": ("ar,mar", [(2, 2, 2), (1, 2, 1), (1, 1, 1)], 1, 300, "ordinal"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_grids_and_alphabets_on_fake_cuda(name, monkeypatch):
    monkeypatch.setattr(generate, "check_finite", lambda *arguments: None)
    with FakeTensorMode(), torch.device("cuda"):
        model = grid_model(*OTHERS[name]).train()
        images, labels = (
            torch.empty(2, model.alphabet.channels, *model.image_shape),
            torch.zeros(2, dtype=torch.long),
        )
        assert model(images, labels).device.type == "cuda"
        drawn = model.generate([1, 2], guidance_scale=4.0, seed=0, output_type="pt", progress_bar=False)
    assert drawn.device.type == "cuda"
    assert drawn.shape == images.shape


def test_fake_tensors_would_catch_a_leak_and_a_sync():
    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(3)
        with pytest.raises(RuntimeError, match="device"):
            x + torch.ones(3, device="cpu")
        with pytest.raises(DataDependentOutputException):
            x.sum().item()


def test_weights_of_another_dtype_draw_float32_images_and_take_them(kind):
    model = tiny_model(kind).bfloat16()
    drawn = model.generate([0, 1], guidance_scale=2.0, seed=0, output_type="pt", progress_bar=False)
    assert drawn.dtype == torch.float32
    assert model(drawn, torch.tensor([0, 1])).isfinite()


def test_no_device_is_named_in_models_or_util():
    """Comparisons with `.type` are allowed: code may choose the faster of two ways for the data's device."""
    root = Path(__file__).parents[2]
    named = re.compile(r"""(?<!\.type == )(?<!\.type != )["'](cuda|cpu|mps|xpu)[:"']|\.cuda\(""")
    for path in [*(root / "models").glob("*.py"), *(root / "util").glob("*.py")]:
        assert not named.search(path.read_text()), path
