"""A colour model of 32 x 32 pixels: Google's Noto emoji through main_fractalgen.py.

    python demo/emoji.py                        fetches, trains, scores: takes about two hours on two cores
    python demo/emoji.py --model FOLDER         scores the model that is there

Writes the emoji as an image folder, trains a FractalMAR with guiding pixels, keeps its averaged weights as float16, prints
bits/dim of held-out and of training images beside lossless files, and writes two sheets: samples of every class, and
samples beside the training images nearest to them. Trains once (and goes on where it was stopped); --retrain trains again.
"""

import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from common import lossless_files, plot_curve, read_split, run_main, share_read_as_asked  # noqa: E402  need the paths above
from emoji_data import CLASSES, COPY, prepare  # noqa: E402

from models import fractalgen  # noqa: E402
from models.fractalgen import FractalGen  # noqa: E402
from util import checkpoint  # noqa: E402
from util.pixels import make_sheet  # noqa: E402

PER_CLASS, BESIDE, PASSES = (
    6,
    2,
    8,
)  # samples of a class; nearest training images of each; masks an image for bits/dim
NAME = "fractalmar_tiny_guided_in32"
MODEL = f"--model {NAME} --class_num {len(CLASSES)} --num_workers 0"
TRAIN = (
    "--no_flip --amp bf16 --batch_size 16 --warmup_epochs 1 --lr 1.5e-3 --r_weight 1 --attn_dropout 0 --proj_dropout 0 "
    "--label_drop_prob 0.1 --ema --ema_decay 0.995 --save_last_freq 1 --save_every_steps 250 --eval_freq 100"
)


def flag(name: str, path: Path) -> str:
    return f"--{name} {shlex.quote(str(path))}"


def train(data: Path, run: Path, epochs: int, retrain: bool) -> None:
    if retrain:
        shutil.rmtree(run, ignore_errors=True)
    run_main(
        f"{MODEL} {TRAIN} --epochs {epochs} {flag('data_path', data)} {flag('output_dir', run)} {flag('resume', run)}"
    )


def keep(run: Path, folder: Path) -> None:
    """The averaged weights of a run as float16, half the size, for FractalGen.from_pretrained (float32 again)."""
    path = checkpoint.locate(run)
    model = fractalgen.build(
        NAME, class_num=len(CLASSES), attn_dropout=0.0, proj_dropout=0.0, label_drop_prob=0.1
    )
    checkpoint.load_weights(model, checkpoint.load(path)["model_ema"], path)
    model.class_names = list(CLASSES)
    model.half().save_pretrained(folder)


def write_seen(data: Path, folder: Path) -> None:
    """folder/val: as many of each class's training images as are held out, neither mirrored nor moved."""
    for label in CLASSES:
        plain = sorted(path for path in (data / "train" / label).iterdir() if not COPY.search(path.stem))
        chosen = np.linspace(0, len(plain) - 1, len(list((data / "val" / label).iterdir()))).astype(int)
        (folder / "val" / label).mkdir(parents=True)
        for number in chosen:
            shutil.copy(plain[number], folder / "val" / label)


def bits_per_dim(model: Path, data: Path, scores: Path) -> dict:
    """Bits/dim of data/val, each image's class given."""
    flags = (
        f"{MODEL} --evaluate_nll --nll_labels --nll_forward_number {PASSES} --amp off {flag('resume', model)}"
    )
    return json.loads(
        run_main(f"{flags} {flag('data_path', data)} {flag('output_dir', scores)}", capture=True)
    )


def draw(folder: Path) -> list[Image.Image]:
    """PER_CLASS samples of each class, with the model's own settings."""
    labels = [label for label in range(len(CLASSES)) for _ in range(PER_CLASS)]
    return FractalGen.from_pretrained(folder).generate(labels, seed=0)


def nearest(images: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (n, BESIDE) of the nearest training images, and root mean squared distances (n,), in levels, to the nearest."""
    flat, others = (group.reshape(len(group), -1).astype(np.float32) for group in (images, train))
    squares = (flat**2).sum(1)[:, None] + (others**2).sum(1) - 2 * flat @ others.T
    order = squares.argsort(1)[:, :BESIDE]
    return order, np.sqrt(((flat - others[order[:, 0]]) ** 2).mean(1))


def show(data: Path, images: list[Image.Image], folder: Path) -> None:
    """samples.png; nearest.png; and in words how far from the training images the samples are."""
    make_sheet(images, columns=PER_CLASS, zoom=2, row_labels=list(CLASSES)).save(folder / "samples.png")
    (train, _), (val, _) = read_split(data / "train"), read_split(data / "val")
    near, apart = nearest(np.stack([np.asarray(image) for image in images]), train)
    few = [i for i in range(len(images)) if i % PER_CLASS < 4]
    rows = [image for i in few for image in (images[i], *map(Image.fromarray, train[near[i]]))]
    make_sheet(rows, columns=4 * (1 + BESIDE), zoom=2, row_labels=list(CLASSES)).save(folder / "nearest.png")
    print("root mean squared distance to the nearest training image, of 255, median")
    print(f"  of samples {np.median(apart):.1f}, of held-out images {np.median(nearest(val, train)[1]):.1f}")
    print(f"  samples closer than 5: {(apart < 5).mean():.0%}")
    read, right = share_read_as_asked(data, images)
    print(
        f"a logistic regression on the training images reads {read:.0%} of the samples as the class asked for"
    )
    print(f"(and {right:.0%} of the held-out images right)")
    print(
        f"\nsamples: {folder / 'samples.png'}; beside the training images nearest to them: {folder / 'nearest.png'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "emoji")
    parser.add_argument("--model", type=Path, help="score the model in this folder, and train none")
    parser.add_argument("--epochs", type=int, default=32, help="of training; more is better")
    parser.add_argument("--retrain", action="store_true", help="train again from the start")
    args = parser.parse_args()
    folder = args.output_dir.resolve()
    data, run, seen, scores = (folder / name for name in ("data", "run", "seen", "scores"))
    folder.mkdir(parents=True, exist_ok=True)
    if not data.exists():
        prepare(data)
    model = args.model
    if model is None:
        train(data, run, args.epochs, args.retrain)
        model = folder / "model"
        keep(run, model)
        plot_curve(run / "log.txt", "FractalMAR on Noto emoji", folder / "loss.png")
    for old in (seen, scores):
        shutil.rmtree(old, ignore_errors=True)
    write_seen(data, seen)
    held_out, trained = bits_per_dim(model, data, scores), bits_per_dim(model, seen, scores)
    print("\nbits per dimension, fewer is better       held out   trained on")
    files = [lossless_files(read_split(folder / "val")[0]) for folder in (data, seen)]
    for name in files[0]:
        print(f"  {name:<40}{files[0][name]:8.3f}{files[1][name]:12.3f}")
    print(f"  {'this model (a bound)':<40}{held_out['bits_per_dim']:8.3f}{trained['bits_per_dim']:12.3f}")
    print(
        f"  {'  its standard error':<40}{held_out['standard_error']:8.3f}{trained['standard_error']:12.3f}\n"
    )
    show(data, draw(model), folder)


if __name__ == "__main__":
    main()
