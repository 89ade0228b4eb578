"""The models reproduce the numbers that docs/format.md, "Reference numbers", describes.

They are in the folder that the environment variable GOLDEN_DIR names, by default tests/golden.
"""

import json
import math
import os
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from conftest import CPU_AND_CUDA, EVERY_DEVICE
from engine_fractalgen import Recipe, compute_nll
from models import fractalgen
from models.fractalgen import FractalGen
from models.generator import Mask
from models.mar import MAR, cosine_plan
from models.noise import ORDER, Noise
from models.pixelloss import PixelLoss
from models.sampling.guidance import Guidance
from util.crop import center_crop_arr
from util.dist import World
from util.pixels import RGB

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
TABLES = {"schedules", "state_dicts"}
CASES = sorted(path.stem for path in GOLDEN_DIR.glob("*.json") if path.stem not in TABLES)
RELATIVE = 1e-4
# Of bfloat16, about three times the largest deviations that were met on a CPU: of the loss and of norms 2.4e-4,
# of single numbers of conditions 3.0e-2, of the norm of all gradients 3.8e-2.
BFLOAT16 = {"loss": 1e-3, "condition": 0.1, "gradient": 0.12}


class Case:
    def __init__(self, name: str):
        self.meta = json.loads((GOLDEN_DIR / f"{name}.json").read_text())
        self.arrays = dict(np.load(GOLDEN_DIR / f"{name}.npz"))

    def model(self) -> FractalGen:
        no_dropout = dict(attn_dropout=0.0, proj_dropout=0.0, label_drop_prob=0.0)
        model = FractalGen(**{**self.meta["config"], **no_dropout, "r_weight": self.meta["r_weight"]})
        model.load_state_dict(self.tensors("weights/"), strict=True)
        return model

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        return {
            k.removeprefix(prefix): torch.from_numpy(v)
            for k, v in self.arrays.items()
            if k.startswith(prefix)
        }

    def masks(self, model: FractalGen, mode: str) -> list[Mask | None]:
        recorded = iter(
            [self.arrays[f"{mode}/mask{i}"] for i in range(99) if f"{mode}/mask{i}" in self.arrays]
        )
        return [
            Mask.of(torch.from_numpy(next(recorded))).to(g.pos_embed_learned.device)
            if isinstance(g, MAR)
            else None
            for g in model.generators
        ]


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return Case(request.param)


def test_there_are_cases_to_check():
    assert CASES, f"no *.json in {GOLDEN_DIR}"


def close(ours: torch.Tensor, golden, what: str, tolerance: float = RELATIVE) -> None:
    ours, golden = ours.detach().cpu(), torch.as_tensor(golden)
    scale = golden.double().abs().max().clamp(min=1e-3)
    worst = (ours.double() - golden.double()).abs().max() / scale
    assert ours.shape == golden.shape, what
    assert worst < tolerance, f"{what}: off by {worst:.1e} of the largest value"


@EVERY_DEVICE
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_forward_and_gradients(case: Case, mode: str, device, monkeypatch):
    model = case.model().to(device).train(mode == "train")
    outputs, logits = [], []
    for generator in model.generators:
        generator.register_forward_hook(lambda module, args, out: outputs.append(out))
    plain_logits = PixelLoss.logits
    monkeypatch.setattr(PixelLoss, "logits", lambda *args: logits.append(plain_logits(*args)) or logits[-1])

    loss = loss_of(case, model, mode)
    loss.backward()

    close(loss, case.arrays[f"{mode}/loss"], "loss")
    assert loss.item() == pytest.approx(case.meta[f"loss_{mode}"], rel=RELATIVE)
    check_conditions(case, mode, outputs, RELATIVE, RELATIVE)
    for i, ours in enumerate(logits):
        close(ours[:48], case.arrays[f"{mode}/logits{i}"], f"logits{i}")
    assert f"{mode}/logits{len(logits)}" not in case.arrays

    golden, found = gradient_norms(case, mode, model)
    assert len(golden) > 10
    largest = max(golden.values())
    for name, norm in golden.items():
        assert found[name] == pytest.approx(norm, rel=RELATIVE, abs=1e-6 * largest), name


@CPU_AND_CUDA
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_forward_and_gradients_in_bfloat16(case: Case, mode: str, device):
    model, outputs = case.model().to(device).train(mode == "train"), []
    for generator in model.generators:
        generator.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.autocast(device.type, torch.bfloat16):
        loss = loss_of(case, model, mode)
    loss.backward()
    assert loss.item() == pytest.approx(case.meta[f"loss_{mode}"], rel=BFLOAT16["loss"])
    check_conditions(case, mode, outputs, BFLOAT16["condition"], BFLOAT16["loss"])
    golden, found = gradient_norms(case, mode, model)
    whole = math.hypot(*(found[name] for name in golden))
    assert whole == pytest.approx(math.hypot(*golden.values()), rel=BFLOAT16["gradient"])


def loss_of(case: Case, model: FractalGen, mode: str) -> torch.Tensor:
    device = model.fake_latent.device
    images = RGB.normalize(torch.from_numpy(case.arrays["u8"]).to(device))
    labels = torch.from_numpy(case.arrays["labels"]).to(device)
    return model(images, labels, masks=case.masks(model, mode), dither=0.0)


def check_conditions(case: Case, mode: str, outputs: list, tolerance: float, of_norms: float) -> None:
    for level, out in enumerate(outputs):
        for j, cond in enumerate(out.conds):
            key = f"{mode}/level{level}/cond{j}"
            close(cond[:96], case.arrays[key], key, tolerance)
            assert cond.norm().item() == pytest.approx(float(case.arrays[f"{key}_norm"]), rel=of_norms)
        assert f"{mode}/level{level}/cond{len(out.conds)}" not in case.arrays


def gradient_norms(case: Case, mode: str, model: FractalGen) -> tuple[dict[str, float], dict[str, float]]:
    """The golden norms of the gradients by weight, and those that were found."""
    prefix = f"{mode}/gradnorm/"
    golden = {k.removeprefix(prefix): float(v) for k, v in case.arrays.items() if k.startswith(prefix)}
    parameters = dict(model.named_parameters())
    assert golden.keys() <= parameters.keys()
    grads = {name: parameters[name].grad for name in golden}
    return golden, {name: 0.0 if grad is None else grad.norm().item() for name, grad in grads.items()}


@pytest.mark.parametrize("case", ["ar3"], indirect=True)  # the masks recorded of MAR are of training's kind
def test_published_nll_is_the_recorded_evaluation_loss(case: Case):
    model, n = case.model(), len(case.arrays["labels"])
    images, labels = torch.from_numpy(case.arrays["u8"]), torch.from_numpy(case.arrays["labels"])
    loader = DataLoader(TensorDataset(images, labels, torch.arange(n)), batch_size=n)
    settings = dict(
        passes=1,
        seed=0,
        device=torch.device("cpu"),
        autocast=nullcontext(),
        world=World(),
        progress_bar=False,
    )
    scores = compute_nll(model, loader, **settings)
    assert scores["published_nll"] * math.log(2) == pytest.approx(case.meta["loss_eval"], rel=RELATIVE)


def raster_noise(sizes: list[int], n: int, device: torch.device) -> Noise:
    """Returns random numbers for which every level draws its patches from the last to the first."""
    maps = [torch.full((n, 5, 1, 1), 0.5)]
    for size, patch in pairwise(sizes):
        grid, parents = size // patch, maps[-1].shape[-1]
        places = torch.arange(grid * grid).flip(0).view(grid, grid) / grid**2
        level = torch.full((n, 5, grid * parents, grid * parents), 0.5)
        level[:, ORDER] = places.repeat(parents, parents)
        maps.append(level)
    return Noise([part.to(device) for part in maps])


@CPU_AND_CUDA
def test_sampling_equals_golden_exactly(case: Case, device):
    """The likeliest value is at least 1e-4 of itself likelier than the next, ten times what float32 errs."""
    model = case.model().eval().to(device)
    labels = torch.from_numpy(case.arrays["labels"]).to(device)
    assert case.meta["samples"]
    for number, settings in enumerate(case.meta["samples"]):
        cond = model.class_emb(labels)
        if settings["cfg"] != 1.0:
            cond = torch.cat([cond, model.fake_latent.repeat(len(labels), 1)])
        images = model.sample(
            [cond] * model.num_conds,
            settings["num_iter_list"],
            settings["cfg"],
            settings["cfg_schedule"],
            settings["temperature"],
            settings["filter_threshold"],
            noise=raster_noise(model.img_size_list, len(labels), device),
            pick=lambda probs, uniforms: probs.argmax(-1),
        )
        golden = torch.from_numpy(case.arrays[f"sample{number}"])
        assert torch.equal(RGB.to_values(images).to(torch.uint8).cpu(), golden), f"sample{number}"


def pieces() -> dict[str, np.ndarray]:
    path = GOLDEN_DIR / "pieces.npz"
    return dict(np.load(path if path.exists() else Path(__file__).parent / "golden" / "pieces.npz"))


def table(name: str):
    path = GOLDEN_DIR / f"{name}.json"
    return json.loads(
        (path if path.exists() else Path(__file__).parent / "golden" / f"{name}.json").read_text()
    )


@pytest.mark.parametrize("key", [k for k in pieces() if k.endswith("/params")])
def test_guidance_probabilities(key: str):
    arrays, name = pieces(), key.removesuffix("/params")
    temperature, scale, threshold = arrays[key]
    logits = torch.cat([torch.from_numpy(arrays[f"{name}/{half}"]) for half in ("cond", "uncond")])
    guidance = Guidance(float(scale), "constant", float(temperature), float(threshold), doubled=True)
    close(guidance.probabilities(logits), arrays[f"{name}/probs"], name)


@pytest.mark.parametrize("key", [k for k in pieces() if k.endswith("/in")])
def test_center_crop_to_the_bit(key: str):
    from PIL import Image

    arrays, name = pieces(), key.removesuffix("/in")
    out = center_crop_arr(Image.fromarray(arrays[key]), int(arrays[f"{name}/size"]))
    assert np.array_equal(np.asarray(out), arrays[f"{name}/out"])


@pytest.mark.parametrize("key", table("schedules")["mar_sampling_plan"])
def test_mar_sampling_plan(key: str):
    golden, (length, steps) = table("schedules")["mar_sampling_plan"][key], map(int, key.split(","))
    plan = list(cosine_plan(length, steps))
    assert [end - begin for begin, end, _ in plan] == golden["patches_per_step"]
    assert [progress for *_, progress in plan] == pytest.approx(golden["cfg_progress"], abs=1e-6)


def test_learning_rate_schedule():
    golden = table("schedules")["cosine_lr"]
    points = golden.pop("points")
    for epoch, lr in points:
        recipe = Recipe(lr_schedule="cosine", grad_clip=3.0, **golden)
        assert recipe.learning_rate(epoch) == pytest.approx(lr, rel=1e-9)


@pytest.mark.parametrize("name", table("state_dicts"))
def test_preset_has_the_published_weights(name: str):
    golden = table("state_dicts")[name]
    with torch.device("meta"):
        model = fractalgen.__dict__[name]()
    assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == golden["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == golden["parameters"]
