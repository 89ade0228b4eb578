"""The trainings and measurements of demo/paper.py: small models of Fashion-MNIST, grey images of 28 px.

All compute with one thread, and times are seconds of the processor, not of the clock, so that other programs
on the machine change them little. `jobs` lists all work.
"""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
import json
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import ROOT
from fashion_classifier import Classifier
from fashion_data import find_data, read_fashion
from PIL import Image

import engine_fractalgen as engine
import main_fractalgen
from evaluation import score
from evaluation.cost import forward_cost
from models.fractalgen import FractalGen
from models.hub.presets import PRESETS, Preset
from models.sampling.edit import box_mask
from util.data.idx import STEMS
from util.files import atomic_write

OUTPUT = ROOT / "output" / "paper"
SEEDS = (0, 1)
BATCH, FEW, MANY = 16, 400, 1200  # images of a step; steps of short and of long trainings
NUM_TEST, NUM_IMAGES, NUM_EDITS = 1000, 1000, 200
SCALES = (1.5, 2, 3, 5)  # of guidance; 1 is without
STEPS = (2, 4, 8, 16, 32)  # of level 0; level 1 takes 16
EDITED = (0, 8, 28, 20)  # x, y, width, height: what a class edit repaints
NUM_TIMED, ROUNDS = 50, 5
FEATURES, DISTANCE = "efficientnet_lite0", "fd_efficientnet_lite0"


def preset(kind: str, levels: int, num_conds: int, guiding_pixel: bool = False) -> Preset:
    """An architecture of 0.7 to 1.4 M weights, with two or three levels as the paper counts them.

    As the paper's, one of two levels has all pixels in one sequence at level 0, of the same width, and the
    head.
    """
    pick = lambda numbers: numbers if levels == 3 else (numbers[0], numbers[-1])  # noqa: E731
    sizes, widths, blocks = pick((28, 4, 1)), pick((128, 64, 32)), pick((3, 2, 1))
    kinds, steps = (kind,) * (levels - 1) + ("ar",), (32, 16)[: levels - 1]
    return Preset(
        sizes, widths, blocks, (4,) * levels, kinds, num_conds, guiding_pixel, steps, 1.0, 1.0, 4e-3,
        {"channels": 1},
    )  # fmt: skip


MODELS = {
    "ar2": preset("ar", 2, 1), "ar3": preset("ar", 3, 1),
    "mar2": preset("mar", 2, 5), "mar3": preset("mar", 3, 5),
    "mar3_one": preset("mar", 3, 1), "mar3_guided": preset("mar", 3, 5, guiding_pixel=True),
}  # fmt: skip
TRAINING = (
    "--class_num 10 --num_workers 0 --amp off --no_flip --optimizer muon --epochs 1 --lr 4e-3 "
    "--warmup_epochs 0.1 --no_ema --save_every_steps 100 --nll_labels --nll_forward_number 4"
)


def register() -> None:
    """Lets this process know MODELS by name, so that flags and the folders of runs can name them."""
    PRESETS.update({f"paper_{name}": model for name, model in MODELS.items()})


def main_command(flags: str, **paths: Path) -> str:
    """Runs main_fractalgen.py in this process. Returns the flags."""
    register()
    words = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    main_fractalgen.main([*flags.split(), *words])
    return flags


def write_data() -> dict:
    """Writes the first images of Fashion-MNIST as IDX files, for short and for long trainings."""
    for steps in (FEW, MANY):
        folder = OUTPUT / f"data-{steps}"
        folder.mkdir(parents=True, exist_ok=True)
        for split, count in (("train", steps * BATCH), ("val", NUM_TEST)):
            for kind, values in zip(
                ("images-idx3", "labels-idx1"), read_fashion(find_data(), split), strict=True
            ):
                lengths = np.array([count, *values.shape[1:]], ">u4").tobytes()
                with atomic_write(folder / f"{STEMS[split]}-{kind}-ubyte") as temporary:
                    temporary.write_bytes(bytes((0, 0, 8, values.ndim)) + lengths + values[:count].tobytes())
    return {"training_images": [FEW * BATCH, MANY * BATCH], "test_images": NUM_TEST}


def train(model: str, steps: int, seed: int) -> dict:
    """Trains for one pass over the data, or goes on, and measures the test images given their classes."""
    run = OUTPUT / f"train-{model}-{steps}-{seed}"
    flags = f"--model paper_{model} {TRAINING} --batch_size {BATCH} --seed {seed}"
    main_command(flags, data_path=OUTPUT / f"data-{steps}", output_dir=run, resume=run)
    scores = {}
    for record in map(json.loads, (run / "log.txt").read_text().splitlines()):
        if record.get("step") == steps:
            scores |= {name.removeprefix("val/"): x for name, x in record.items() if name != "train/lr"}
    if "bits_per_dim" not in scores:
        raise KeyboardInterrupt  # a signal has ended the training; its checkpoint is kept
    return {"flags": flags, **scores}


def make_reference() -> dict:
    """The features of the 10,000 test images."""
    made = ["--split", "val", "--make_reference", str(OUTPUT / "reference.npz")]
    score.main([str(find_data()), *made, "--features", FEATURES, "--num_workers", "0"])
    return {"reference": "the test images"}


def load_classifier() -> Classifier:
    return Classifier.trained(find_data(), OUTPUT / "classifier.pt")


def measure_classifier() -> dict:
    images, labels = read_fashion(find_data(), "val")
    return {"accuracy": float((load_classifier()(images) == labels).mean())}


def judge(folder: Path) -> dict:
    """Scores images 00000.png, … of a folder, equally many of each class in their order."""
    score.main([str(folder), str(OUTPUT / "reference.npz"), "--features", FEATURES, "--num_workers", "0"])
    scores = json.loads((folder / "metrics.json").read_text())["scores"]
    images = np.stack([np.asarray(Image.open(path).convert("L")) for path in sorted(folder.glob("*.png"))])
    wanted = np.arange(len(images)) * 10 // len(images)
    asked = float((load_classifier()(images) == wanted).mean())
    return {"images": len(images), "fd": scores[DISTANCE], "read_as_asked": asked, "seam": seam(images)}


def seam(images: np.ndarray, patch: int = 4) -> float:
    """The mean absolute step between neighbouring pixels across borders of patches, over that inside them.

    images  uint8 (n, side, side)
    """
    across, inside = [], []
    for axis in (1, 2):
        steps = np.abs(np.diff(images.astype(np.float32), axis=axis)).mean(axis=(0, 3 - axis))
        border = np.arange(1, len(steps) + 1) % patch == 0
        across.append(steps[border].mean())
        inside.append(steps[~border].mean())
    return float(sum(across) / sum(inside))


def judge_real() -> dict:
    """The scores of training images that no model here has seen: what perfect samples would get."""
    images, labels = (values[MANY * BATCH :] for values in read_fashion(find_data(), "train"))
    folder = OUTPUT / "real"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    chosen = [i for label in range(10) for i in np.flatnonzero(labels == label)[: NUM_IMAGES // 10]]
    for number, i in enumerate(chosen):
        Image.fromarray(images[i]).save(folder / f"{number:05d}.png")
    return judge(folder)


def draw(model: str, scale: float, schedule: str, steps: int, seed: int) -> dict:
    """Draws images of all classes and scores them."""
    folder = OUTPUT / f"draw-{model}-{scale:g}-{schedule}-{steps}-{seed}"
    flags = (
        f"--model paper_{model} --evaluate_gen --num_images {NUM_IMAGES} --gen_bsz 250 --amp off "
        f"--seed {seed} --cfg {scale:g} --cfg_schedule {schedule} --num_iter_list {steps},16"
    )
    main_command(flags, resume=OUTPUT / f"train-{model}-{MANY}-{seed}", output_dir=folder)
    return {"flags": flags, **judge(folder / "generated")}


def edit(model: str, seed: int) -> dict:
    """Repaints EDITED of test images as another class, each of the nine in turn, and as their own class."""
    register()
    images, labels = (values[:NUM_EDITS] for values in read_fashion(find_data(), "val"))
    network = FractalGen.from_pretrained(OUTPUT / f"train-{model}-{MANY}-{seed}")
    others, result = (labels + 1 + np.arange(NUM_EDITS) % 9) % 10, {"edits": NUM_EDITS}
    for name, targets in (("another", others), ("own", labels)):
        edited = network.edit(
            images[..., None], box_mask(28, EDITED), targets.tolist(), seed=seed, guidance_scale=2.0,
            num_inference_steps=(32, 16), amp="off", output_type="np", progress_bar=False,
        )  # fmt: skip
        found = load_classifier()(edited[..., 0])
        result[f"{name}_read_as_asked"] = float((found == targets).mean())
        result[f"{name}_read_as_before"] = float((found == labels).mean())
    return result


def pace(seed: int) -> dict:
    """Seconds of the processor that a training step and an image take: the middle of ROUNDS.

    A round measures each model once, so that what disturbs the machine disturbs all of them.
    """
    recipe = engine.Recipe(4e-3, 0.0, "constant", 0.0, 1, 3.0, optimizer="muon")
    scaler, device = torch.amp.GradScaler("cpu", enabled=False), torch.device("cpu")
    torch.manual_seed(seed)
    settings = dict(class_num=10, attn_dropout=0.0, proj_dropout=0.0)  # as the trainings have
    networks = {name: FractalGen(**model.arguments, **settings) for name, model in MODELS.items()}
    optimizers = {name: engine.make_optimizer(network, recipe) for name, network in networks.items()}

    def step(name: str) -> None:
        values = torch.randint(256, (BATCH, 1, 28, 28), dtype=torch.uint8)
        inputs = iter([(values, torch.zeros(BATCH, dtype=torch.int64), None)]), optimizers[name], scaler
        engine.train_step(networks[name], *inputs, recipe, engine.Window(device), device, nullcontext())

    def sample(name: str) -> None:
        settings = dict(seed=seed, num_inference_steps=(32, 16), amp="off", progress_bar=False)
        networks[name].generate([0] * NUM_TIMED, **settings)

    found = {f"step_{name}": (step, name, 1) for name in MODELS}
    found |= {f"image_{name}": (sample, name, NUM_TIMED) for name in ("ar3", "mar3")}
    seconds = {key: [] for key in found}
    for _ in range(1 + ROUNDS):
        for key, (call, name, count) in found.items():
            began = time.process_time()
            call(name)
            seconds[key].append((time.process_time() - began) / count)
    result = {key: float(np.median(rounds[1:])) for key, rounds in seconds.items()}  # the first warms up
    steps = {name: FEW if name.endswith("2") else MANY for name in MODELS}
    return {**result, **{f"minutes_{name}": steps[name] * result[f"step_{name}"] / 60 for name in MODELS}}


def count() -> dict:
    """GFLOPs of an image by level and entries of attention matrices, in millions, as the paper counts them.

    "flat" is all pixels in one sequence.
    """
    result = {}
    for name in ("ar2", "ar3", "fractalmar_in64", "fractalmar_large_in256"):
        model = MODELS.get(name) or PRESETS[name]
        with torch.device("meta"):
            network = FractalGen(**model.arguments)
            flat = FractalGen((model.sizes[0], 1), (4, 4), (1, 1), (1, 1), ("mar", "ar"))
        flops, entries = forward_cost(network)
        result |= {f"gflops_{name}_{level}": operations / 1e9 for level, operations in enumerate(flops)}
        result |= {f"gflops_{name}": sum(flops) / 1e9, f"entries_{name}": max(entries) / 1e6}
        result[f"entries_{name}_flat"] = whole = forward_cost(flat)[1][0] / 1e6
        result |= {
            f"fewer_{name}": whole * 1e6 / max(entries),
            f"fewer_{name}_all": whole * 1e6 / sum(entries),
        }
    return result


@dataclass(frozen=True)
class Job:
    """One training or measurement: `work` returns the result, from the results of the jobs in `needs`.

    minutes  what it takes on one core, as planned
    """

    minutes: float
    work: Callable[[], dict]
    needs: tuple[str, ...] = ()


def jobs() -> dict[str, Job]:
    """All work by name, in the order in which it is done."""
    found = {
        "count": Job(1, count),
        "data": Job(1, write_data),
        "classifier": Job(3, measure_classifier),
        "reference": Job(13, make_reference),
        "real": Job(2, judge_real, ("classifier", "reference")),
    }
    trainings = [("ar3", FEW, 4), ("mar3", FEW, 4), ("ar2", FEW, 13), ("mar2", FEW, 14)]
    trainings += [(model, MANY, 11) for model in ("ar3", "mar3", "mar3_one", "mar3_guided")]
    cells = [("mar3", 1, "linear", steps) for steps in STEPS] + [("mar3", 2, "linear", STEPS[-1])]
    cells += [(model, 1, "linear", STEPS[-1]) for model in ("mar3_one", "mar3_guided", "ar3")]
    cells += [("ar3", scale, schedule, STEPS[-1]) for schedule in ("linear", "constant") for scale in SCALES]
    for seed in SEEDS:
        found[f"pace-{seed}"] = Job(2, partial(pace, seed))
        for model, steps, minutes in trainings:
            work = partial(train, model, steps, seed)
            found[f"train-{model}-{steps}-{seed}"] = Job(minutes, work, ("data",))
    for seed in SEEDS:
        for model, scale, schedule, steps in cells:
            needs = "classifier", "reference", f"train-{model}-{MANY}-{seed}"
            work = partial(draw, model, scale, schedule, steps, seed)
            found[f"draw-{model}-{scale:g}-{schedule}-{steps}-{seed}"] = Job(4, work, needs)
        for model in ("ar3", "mar3"):
            needs = "classifier", f"train-{model}-{MANY}-{seed}"
            found[f"edit-{model}-{seed}"] = Job(2, partial(edit, model, seed), needs)
    return found
