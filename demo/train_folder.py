"""Trains a model on a folder of images, in a given time, and writes it as a folder that the demos load.

    python demo/train_folder.py FOLDER [--hours 1] [--output_dir output/FOLDER]

FOLDER holds images, or a folder of images for each class, or whatever else --data_path of main_fractalgen.py
takes. Model, size, batch, learning rate and epochs are chosen from the images and the time; the command line
of main_fractalgen.py that does the work is printed. At the end come bits per dimension of held-out images,
beside those of PNG and WebP files, a sheet of samples, and the model. A second call goes on where the first
was stopped. See --retrain.
"""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
from baselines import lossless_bits_per_dim
from common import ROOT, add_device_flag, make_parser, run_main
from PIL import Image

from models.fractalgen import PRESETS, FractalGen
from models.hub.about import About
from util import checkpoint
from util.data.loader import ImageDataset, open_split
from util.data.source import Source
from util.errors import UserError, one_line, reading
from util.files import make_writable, write_json
from util.pixels import RGB, make_sheet
from util.run.plan import duration

MODELS = (  # the largest first
    "fractalar_tiny_in64", "fractalar_tiny_in32", "fractalar_tiny_in16", "fractalmar_tiny_in8"
)  # fmt: skip
BATCHES = (64, 32, 16, 8, 4)  # the largest that allows MIN_STEPS; if none does, a smaller model is taken
MIN_STEPS = 2000
OVERHEAD = 0.85  # share of the time that is left for training, besides evaluation and checkpoints
LOOKED_AT = 64  # images whose size is looked at
PASSES = 8  # random masks an image, where bits per dimension are a bound
SHOWN, PER_CLASS = 8, 6  # classes on the sheet of samples, and samples of each


def typical_side(source: Source) -> int:
    """The median of the shorter sides of some images, in pixels."""
    if source.shape is not None:
        return min(source.shape)
    sides = []
    for number in np.linspace(0, len(source) - 1, min(len(source), LOOKED_AT)).astype(int).tolist():
        try:
            sides.append(min(source.image(number).size))
        except UserError:  # training names it
            continue
    if not sides:
        raise UserError(f"{source.name(0)}: cannot be read as an image, and neither can others of the folder")
    return int(np.median(sides))


def measure(model: str, batch: int, data: Path, device: str) -> float:
    """Seconds of a training step, by --dry_run. Raises UserError where there is no memory for one."""
    flags = f"--model {model} --batch_size {batch} --num_workers 0 --dry_run {device}"
    plan = json.loads(run_main(flags, capture=True, quiet=True, data_path=data))["run"]
    if plan["seconds"] is None:
        raise UserError(f"{model} needs {plan['gib']:.2g} GiB for a training step; free some memory")
    return plan["seconds"]


def choose(train: Source, data: Path, hours: float, device: str) -> dict:
    """Chooses model, batch size and epochs for a time. Returns them, and the seconds of a step."""
    side, time_left = typical_side(train), hours * 3600 * OVERHEAD
    sizes = {name: PRESETS[name].sizes[0] for name in MODELS}
    fitting = [name for name, size in sizes.items() if size <= side] or [MODELS[-1]]
    if train.shape is not None:  # these images cannot be scaled
        fitting = [name for name, size in sizes.items() if size == side]
        if not fitting:
            known = ", ".join(map(str, sizes.values()))
            raise UserError(f"{data}: {train.kind}, but there are models of {known} px; give the images")
    batches = [size for size in BATCHES if size <= len(train)] or [1]
    for model in fitting:
        least = measure(model, batches[-1], data, device)
        steps = time_left / least
        print(f"{model}: time for {steps:,.0f} steps of {batches[-1]} images", flush=True)
        if steps >= MIN_STEPS:
            break
    batch, step = batches[-1], least
    for size in reversed(batches[:-1]):
        if time_left / (longer := measure(model, size, data, device)) < MIN_STEPS:
            break
        batch, step = size, longer
    epochs = max(1, math.floor(time_left / step / (len(train) // batch)))
    lr = PRESETS[model].lr * math.sqrt(batch / 16)
    return {"model": model, "batch_size": batch, "epochs": epochs, "lr": float(f"{lr:.2g}"), "seconds": step}


def crops(source: Source, size: int) -> np.ndarray:
    """The images of a split as a model sees them: uint8 (n, size, size, 3), without those that are bad."""
    data, images = ImageDataset(source, (size, size), RGB, seed=0), []
    for number in range(len(data)):
        try:
            images.append(data[0, number][0].permute(1, 2, 0).numpy())
        except UserError:
            continue
    return np.stack(images)


def save_model(run: Path, folder: Path, data: Path, held_out: np.ndarray) -> FractalGen:
    """Writes the model of a run as a folder, with its best weights and what is to be known of it."""
    best = run / checkpoint.BEST
    model = FractalGen.from_pretrained(best if best.is_file() else run)
    if len(held_out) > 1:
        side = model.img_size_list[0]
        limits = f"Draws {side} px images like these, and knows nothing else."
        number = len(open_split(data, "train"))
        name = one_line(f"{number:,} images of {data.name}")
        model.about = About.of_model(model, held_out[:LOOKED_AT], name, limits)
    model.save_pretrained(folder)
    return model


def draw_sheet(model: FractalGen) -> Image.Image:
    """Samples of up to SHOWN classes, a row for each, enlarged to at least 96 px."""
    zoom = max(1, 96 // model.img_size_list[0])
    if not model.class_num:
        return make_sheet(model.generate(num_images=SHOWN * PER_CLASS, seed=0), columns=SHOWN, zoom=zoom)
    classes = np.linspace(0, model.class_num - 1, min(SHOWN, model.class_num)).astype(int).tolist()
    images = model.generate([label for label in classes for _ in range(PER_CLASS)], seed=0)
    names = [model.class_names[label] for label in classes]
    return make_sheet(images, columns=PER_CLASS, zoom=zoom, row_labels=names)


def evaluate(
    data: Path, held_out: np.ndarray, model: FractalGen, folder: Path, out: Path, device: str
) -> None:
    """Prints bits per dimension of the held-out images: of files and of the model in `folder`."""
    labels = "--nll_labels" if model.class_num else ""
    exact = all(generator.exact_likelihood for generator in model.generators)
    passes = 1 if exact else PASSES
    flags = f"--evaluate_nll {labels} --nll_forward_number {passes} --nll_bsz 16 --num_workers 0 {device}"
    scores = json.loads(run_main(flags, capture=True, resume=folder, data_path=data, output_dir=out))
    print(f"\nbits per dimension of the {scores['num_images']} held-out images, fewer is better")
    for name, bits in lossless_bits_per_dim(held_out).items():
        print(f"  {name:<26}{bits:6.3f}")
    name = "this model, exact" if exact else "this model, a bound"
    print(f"  {name:<26}{scores['bits_per_dim']:6.3f}  +- {scores['standard_error']:.3f}\n")


def train(args: argparse.Namespace, folder: Path, device: str) -> dict:
    """Trains with the settings in plan.json, which are chosen at the first call, and returns them."""
    path, data = folder / "plan.json", args.folder.resolve()
    if path.is_file():
        print(f"the settings of {path} are taken again; --retrain chooses them anew")
    else:
        images = open_split(data, "train")
        print(f"{data}: {images.kind}, {len(images)} images of {len(images.classes)} classes to train on")
        plan = choose(images, data, args.hours, device)
        write_json(path, plan)
        steps = plan["epochs"] * (len(images) // plan["batch_size"])
        expected = duration(steps * plan["seconds"])
        print(f"{steps} steps of {plan['seconds']:.3g} s: about {expected} of training\n")
    with reading(path, "is damaged; --retrain begins anew"):
        plan = json.loads(path.read_text())
        words = " ".join(f"--{name} {plan[name]}" for name in ("model", "batch_size", "epochs", "lr"))
        evaluations = math.ceil(plan["epochs"] / 5)
    words += f" --eval_freq {evaluations} --save_last_freq {math.ceil(evaluations / 4)} --num_workers 0"
    words += " --no_flip" if args.no_flip else ""
    run_main(f"{words} {device}", data_path=data, output_dir=folder / "run", resume=folder / "run")
    return plan


def main() -> None:
    parser = make_parser("train_folder.py", __doc__)
    parser.add_argument("folder", type=Path, help="images, class folders, or train/ and val/ of these")
    parser.add_argument("--hours", type=float, default=1.0, help="time for training; default: 1")
    parser.add_argument("--no_flip", action="store_true", help="do not mirror images (for digits or text)")
    parser.add_argument("--output_dir", type=Path, help="default: output/ and the name of FOLDER")
    parser.add_argument("--retrain", action="store_true", help="train again from the start")
    add_device_flag(parser)
    args = parser.parse_args()
    with parser.one_line_errors():
        if not 0.001 <= args.hours < math.inf:
            raise UserError(f"--hours {args.hours} must be at least 0.001")
        device = f"--device {args.device}" if args.device else ""
        val = open_split(args.folder, "val")  # says what is wrong with the folder
        folder = make_writable(args.output_dir or ROOT / "output" / args.folder.resolve().name).resolve()
        if args.retrain:
            shutil.rmtree(folder / "run", ignore_errors=True)
            (folder / "plan.json").unlink(missing_ok=True)
        began = time.perf_counter()
        plan, data = train(args, folder, device), args.folder.resolve()
        held_out = crops(val, PRESETS[plan["model"]].sizes[0])
        model = save_model(folder / "run", folder / "model", data, held_out)
        evaluate(data, held_out, model, folder / "model", folder, device)
        draw_sheet(model).save(folder / "samples.png")
    print(f"samples: {folder / 'samples.png'}")
    print(f"the model, for --model of the demos: {folder / 'model'}")
    print(f"done in {duration(time.perf_counter() - began)}")


if __name__ == "__main__":
    main()
