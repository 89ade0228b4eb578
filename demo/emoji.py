"""Trains and evaluates a model of colour images, 32 x 32 pixels: emoji of three vendors, in five classes.

    python demo/emoji.py                        downloads, trains, evaluates: about two hours on one core
    python demo/emoji.py --model FOLDER         evaluates the model in FOLDER

Runs main_fractalgen.py. Writes the emoji as a folder of images, trains a FractalAR, and saves its averaged
weights as float16. Prints bits per dimension of held-out and of training images, beside those of lossless
files. Writes two sheets: samples of every class, and samples beside the training images nearest to them. A
second call does not train again, but goes on if training was stopped. See --retrain.
"""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from baselines import classify_by_regression, draw_nearest, lossless_bits_per_dim, nearest
from common import (
    ROOT,
    make_parser,
    plot_curve,
    read_split,
    run_main,
)
from emoji_data import CLASSES, COPY, prepare
from PIL import Image

from models import fractalgen
from models.fractalgen import FractalGen
from models.hub.about import About
from util import checkpoint
from util.files import make_writable
from util.pixels import make_sheet

PER_CLASS = 11  # samples of each class
NAME = "fractalar_tiny_small_in32"
MODEL = f"--model {NAME} --class_num {len(CLASSES)} --num_workers 0"
TRAINING = (
    "--no_flip --amp off --optimizer muon --batch_size 16 --warmup_epochs 0.5 --lr 4e-3 --weight_decay 0.2 "
    "--r_weight 1 --attn_dropout 0.1 --proj_dropout 0.1 --label_drop_prob 0.2 --shift 1 --ema "
    "--ema_decay 0.998 --save_last_freq 1 --save_every_steps 250 --eval_freq 4"
)
DEFAULTS = {"guidance_scale": 3.0, "guidance_schedule": "constant", "temperature": 1.15}
TRAINED_ON = "Noto, Twemoji and Fluent emoji (2,127 images)"
LIMITS = "Draws 32 px emoji; photographs need the published weights or your own."


def train(data: Path, run: Path, epochs: int, retrain: bool) -> None:
    if retrain:
        shutil.rmtree(run, ignore_errors=True)
    run_main(f"{MODEL} {TRAINING} --epochs {epochs}", data_path=data, output_dir=run, resume=run)


def save_model(run: Path, data: Path, folder: Path) -> None:
    """Saves a run's averaged weights, as float16 to halve the file; from_pretrained gives float32 again.

    With them goes what the model was trained on, measured on the held-out images in data/val.
    """
    path = checkpoint.locate(run)
    model = fractalgen.build(
        NAME, class_num=len(CLASSES), attn_dropout=0.0, proj_dropout=0.0, label_drop_prob=0.2
    )
    checkpoint.load_weights(model, checkpoint.load(path)["model_ema"], path)
    model.class_names = list(CLASSES)
    model.sampling_defaults = replace(model.sampling_defaults, **DEFAULTS)
    model.about = About.of_model(model, read_split(data / "val")[0], TRAINED_ON, LIMITS)
    model.half().save_pretrained(folder)


def write_trained_on(data: Path, folder: Path) -> None:
    """Copies some of the training images to folder/val, so that they can be evaluated like held-out images.

    Each class gets as many of them as it has held-out images. None is mirrored or moved.
    """
    for label in CLASSES:
        plain = sorted(path for path in (data / "train" / label).iterdir() if not COPY.search(path.stem))
        chosen = np.linspace(0, len(plain) - 1, len(list((data / "val" / label).iterdir()))).astype(int)
        (folder / "val" / label).mkdir(parents=True)
        for number in chosen:
            shutil.copy(plain[number], folder / "val" / label)


def bits_per_dim(model: Path, data: Path, scores: Path) -> dict:
    """Returns the scores of the images in data/val; the model gets the class of each image."""
    flags = f"{MODEL} --evaluate_nll --nll_labels --amp off"
    return json.loads(run_main(flags, capture=True, resume=model, data_path=data, output_dir=scores))


def draw(folder: Path) -> list[Image.Image]:
    """Draws PER_CLASS samples of each class with the model's own settings."""
    labels = [label for label in range(len(CLASSES)) for _ in range(PER_CLASS)]
    return FractalGen.from_pretrained(folder).generate(labels, seed=0)


def evaluate(model: Path, data: Path, folder: Path) -> None:
    """Prints bits per dimension of the model and of lossless files, for held-out and for training images."""
    trained_on, scores = folder / "seen", folder / "scores"
    for old in (trained_on, scores):
        shutil.rmtree(old, ignore_errors=True)
    write_trained_on(data, trained_on)
    exact = [bits_per_dim(model, images, scores) for images in (data, trained_on)]
    files = [lossless_bits_per_dim(read_split(images / "val")[0]) for images in (data, trained_on)]
    print("\nbits per dimension, fewer is better       held out   trained on")
    rows = [(name, [bits[name] for bits in files]) for name in files[0]]
    rows.append(("this model, given the class", [score["bits_per_dim"] for score in exact]))
    rows.append(("  standard error over images", [score["standard_error"] for score in exact]))
    for name, (held_out, seen) in rows:
        print(f"  {name:<40}{held_out:8.3f}{seen:12.3f}")
    print()


def show(data: Path, samples: list[Image.Image], folder: Path) -> None:
    """Writes samples.png and nearest.png, and prints how far the samples are from the training images."""
    make_sheet(samples, columns=PER_CLASS, zoom=2, row_labels=list(CLASSES)).save(folder / "samples.png")
    (train, _), (val, _) = read_split(data / "train"), read_split(data / "val")
    numbers, distances = nearest(np.stack([np.asarray(image) for image in samples]), train)
    shown = [i for i in range(len(samples)) if i % PER_CLASS < 3]
    sheet = draw_nearest([samples[i] for i in shown], train[numbers[shown]], 3, list(CLASSES))
    sheet.save(folder / "nearest.png")
    print("root mean squared distance to the nearest training image, in values 0..255, median")
    print(f"  of samples {np.median(distances):.1f}, ", end="")
    print(f"of held-out images {np.median(nearest(val, train)[1]):.1f}")
    print(f"  samples closer than 5: {(distances < 5).mean():.0%}")
    share, accuracy = classify_by_regression(data, samples)
    print(f"a logistic regression, trained on the training images, reads {share:.0%} of the samples as")
    print(f"the class that they were drawn for, and {accuracy:.0%} of the held-out images right")
    print(f"\nsamples: {folder / 'samples.png'}")
    print(f"samples beside the training images nearest to them: {folder / 'nearest.png'}")


def main() -> None:
    parser = make_parser("emoji.py", __doc__)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "emoji")
    parser.add_argument("--model", type=Path, help="evaluate the model in this folder, and do not train")
    parser.add_argument("--epochs", type=int, default=24, help="of training")
    parser.add_argument("--retrain", action="store_true", help="train again from the start")
    args = parser.parse_args()
    with parser.one_line_errors():
        folder = make_writable(args.output_dir).resolve()
    data, run = folder / "data", folder / "run"
    if not data.exists():
        prepare(data)
    if args.model is None:
        train(data, run, args.epochs, args.retrain)
        model = folder / "model"
        save_model(run, data, model)
        plot_curve(run / "log.txt", "FractalAR on emoji", folder / "loss.png")
    else:
        model = args.model.resolve()
    evaluate(model, data, folder)
    show(data, draw(model), folder)


if __name__ == "__main__":
    main()
