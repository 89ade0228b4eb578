"""Fixtures and tiny models that several test files use."""

import contextlib
import io
import json
import os
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch
from PIL import Image
from stand_in import STAND_IN, StandIn

from models.fractalgen import FractalGen
from models.sampling import precision
from util import errors

ROOT = Path(__file__).resolve().parent.parent

TINY = {
    "ar": dict(generator_type_list=["ar", "ar", "ar"], num_conds=1),
    "mar": dict(generator_type_list=["mar", "mar", "ar"], num_conds=5),
    "mar over ar": dict(generator_type_list=["mar", "ar", "ar"], num_conds=5),
    "ar over mar": dict(generator_type_list=["ar", "mar", "ar"], num_conds=1),
    "guided": dict(generator_type_list=["mar", "mar", "ar"], num_conds=3, guiding_pixel=True),
}


def tiny_model(kind: str = "mar", **changes) -> FractalGen:
    """Returns a model of 8 px images and 2 px patches, with seeded random weights, in evaluation mode."""
    torch.manual_seed(0)
    config = dict(
        img_size_list=[8, 2, 1],
        embed_dim_list=[32, 16, 16],
        num_blocks_list=[2, 1, 1],
        num_heads_list=[2, 2, 2],
        class_num=4,
    )
    return FractalGen(**{**config, **TINY[kind], **changes}).eval()


# Generators above the head, sizes, channels, values, ordinal or categorical
GRID_MODELS = {
    "a sequence": ("mar,ar", [(12,), (3,), (1,)], 4, 20, "categorical"),
    "bits": ("ar,ar", [(8,), (4,), (1,)], 1, 2, "ordinal"),
    "a grey rectangle": ("mar,mar", [(4, 6), (2, 3), (1, 1)], 1, 17, "ordinal"),
    "RGBA": ("ar,mar", [(4, 4), (2, 2), (1, 1)], 4, 256, "ordinal"),
    "a volume": ("ar,ar", [(4, 2, 6), (2, 1, 3), (1, 1, 1)], 2, 300, "ordinal"),
}


def grid_model(
    generators: str, sizes, channels: int, num_values: int, value_kind: str, **changes
) -> FractalGen:
    """Returns a model of arrays on any grid, whose drawn values depend on all before them, as `swayed`.

    generators  those above the head, as in "mar,ar"; a MAR level uses all conditions that it can get
    sizes       of all levels, each with one number for each axis
    """
    names, depth = generators.split(","), len(sizes)
    config = dict(
        img_size_list=sizes,
        embed_dim_list=[24] * depth,  # two heads and three axes of rotary positions divide it
        num_blocks_list=[2] * (depth - 1) + [1],
        num_heads_list=[2] * depth,
        generator_type_list=[*names, "ar"],
        num_conds=1 if "mar" not in names or "ar" in names[:-1] else 1 + 2 * len(sizes[0]),
    )
    alphabet = dict(channels=channels, num_values=num_values, value_kind=value_kind)
    return swayed(tiny_model(**{**config, **alphabet, **changes}))


def opinionated(model: FractalGen) -> FractalGen:
    """Enlarges weights, so that drawn values depend on labels, conditions and neighbours as if trained."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(20 if "emb" in name or "codebook" in name or "latent" in name else 1.5)
    return model


def swayed(model: FractalGen) -> FractalGen:
    """Like `opinionated`; in addition, drawn values depend on small changes of guiding pixels."""
    opinionated(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("pix_proj.weight"):
                weight.mul_(100)
    return model


@pytest.fixture(params=TINY)
def kind(request) -> str:
    return request.param


CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
CPU_AND_CUDA = pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
EVERY_DEVICE = pytest.mark.parametrize("device", ["cpu", "stand-in", CUDA], indirect=True)


@pytest.fixture(params=["stand-in", CUDA])
def device(request, monkeypatch):
    """A GPU without TF32 (`pytest -m gpu`), and otherwise what stands in for it: see tests/stand_in.py."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        yield torch.device("cuda", 0)
        torch.set_float32_matmul_precision(before)
    elif request.param == "stand-in":
        # Inference mode hides the operations that composite ones consist of.
        monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
        monkeypatch.setattr(torch, STAND_IN.type, SimpleNamespace(), raising=False)  # its module
        optimizer, devices = sys.modules["torch.optim.optimizer"], ["cpu", STAND_IN.type]
        monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: devices)
        with StandIn():
            yield STAND_IN
    else:
        yield torch.device("cpu")


@pytest.fixture(autouse=True)
def _same_numbers_on_every_machine(monkeypatch):
    """The same random numbers and warnings, and no bfloat16 because it happens to be faster."""
    torch.manual_seed(0)
    precision._choose_once.cache_clear()
    errors.warn_once.cache_clear()
    monkeypatch.setattr("util.precision.bf16_gain", lambda *products: 0.5)


def train_tiny(data_path, output_dir, flags: str = "") -> list[dict]:
    """Trains a tiny model of 8 px for an epoch by the command line. Returns the records of its log.txt."""
    import main_fractalgen

    settings = (
        "--model fractalar_tiny_in8 --device cpu --amp off --num_workers 0 --batch_size 2 --nll_bsz 5 --epochs 1 "
        f"--warmup_epochs 0 --lr 1e-3 --num_iter_list 4,16 --class_num 3 {flags}"
    )
    main_fractalgen.main([*settings.split(), "--data_path", str(data_path), "--output_dir", str(output_dir)])
    return [json.loads(line) for line in (output_dir / "log.txt").read_text().splitlines()]


def run_here(flags: str, capture=False, quiet=False, **paths) -> str:
    """Stands in for the demos' `run_main`: the same command in this process."""
    import main_fractalgen

    words = [*shlex.split(flags), *(x for name, path in paths.items() for x in (f"--{name}", str(path)))]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main_fractalgen.main([*words, "--amp", "off"])
    return out.getvalue()


def score(records: list[dict], name: str) -> float:
    """Returns the last number of that name in a log."""
    return [record[name] for record in records if name in record][-1]


def save_image(path, values: torch.Tensor) -> None:
    """Writes values (3, H, W), uint8, as an image file of the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.permute(1, 2, 0).numpy()).save(path)


def random_values(n: int, size: int, seed: int = 0) -> torch.Tensor:
    """Returns n images of random values, uint8 (n, 3, size, size)."""
    return torch.randint(
        0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A weights file of the Inception network with seeded random numbers.

    The real file is a download of 96 MB. The weights are scaled so that different images have
    different features, as with trained weights.
    """
    import torch_fidelity.feature_extractor_inceptionv3 as inception

    torch.manual_seed(0)
    network = inception.FeatureExtractorInceptionV3
    with patch.object(network, "load_state_dict"), patch.object(inception, "load_state_dict_from_url"):
        built = network("random", ["2048"])
    for name, weight in built.named_parameters():
        if weight.dim() == 4:
            torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")
        elif name == "fc.weight":
            torch.nn.init.normal_(weight, std=0.5)
    path = tmp_path_factory.mktemp("inception") / "weights-inception.pth"
    torch.save(built.state_dict(), path)
    return path


@pytest.fixture
def colour_network(monkeypatch):
    """Replaces the networks of scores by a fast one, whose features are an image's mean colour."""
    from evaluation import score

    class Colour:
        about = {"name": "stand-in", "weights_sha256": "abc"}  # noqa: RUF012

        def __init__(self, file, device):
            pass

        def __call__(self, values):
            colour = values.float().mean((2, 3)) / 255
            return colour, 20 * colour

    monkeypatch.setattr(score, "Inception", Colour)
    monkeypatch.setattr(score, "EfficientNetLite0", lambda device: Colour(None, device))
    return Colour
