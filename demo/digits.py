"""Trains and evaluates a small model on real scans: scikit-learn's handwritten digits.

    python demo/digits.py [--output_dir output/digits] [--retrain]

Runs main_fractalgen.py as one would for ImageNet. Writes the digits as a folder of images, trains a small
FractalAR of what they are, one channel of 17 values, prints its exact bits per dimension on the validation
scans beside baselines, samples every class with guidance, and repaints parts of validation scans. Writes the
samples, the edits, the loss curve and the model.
A second call does not train again, except with --retrain.
"""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
import json
import lzma
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from baselines import classify_by_regression, lossless_bits_per_dim
from common import (
    ROOT,
    make_parser,
    plot_curve,
    read_split,
    run_main,
)
from PIL import Image

from models.fractalgen import FractalGen
from models.sampling.edit import box_mask
from util.files import make_writable
from util.pixels import Alphabet, make_sheet

PER_CLASS = 8  # samples of each digit
SHOWN = 72, 72  # pixels; to people, scans of 8 x 8 pixels look like digits once they are enlarged smoothly
# Name; box x, y, width, height; whether the box is repainted, or all around it; what is added to the class.
EDITS = (
    ("inpaint", (1, 2, 6, 3), True, 0),
    ("outpaint", (0, 0, 8, 4), False, 0),
    ("uncrop", (2, 2, 4, 4), False, 0),
    ("class edit", (0, 3, 8, 5), True, 5),
)
VALUES = Alphabet(channels=1, num_values=17)
MODEL = "--model fractalar_tiny_in8 --channels 1 --num_values 17 --class_num 10 --num_workers 0 --amp off"
SAMPLING = "--cfg 2 --temperature 1.2"
TRAINING = (
    "--no_flip --batch_size 16 --epochs 24 --warmup_epochs 3 --lr 3e-3 --proj_dropout 0.35 "
    "--weight_decay 0.5 --ema --ema_decay 0.998 --save_last_freq 8 --eval_freq 8"
)


def write_digits(folder: Path) -> None:
    """Writes 1,797 scans (8 x 8 pixels, 17 greys) to folder/{train,val}/DIGIT/NUMBER.png; a fifth is val."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    numbers = np.arange(len(digits.target))
    train, val = train_test_split(numbers, test_size=0.2, random_state=0, stratify=digits.target)
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    for split, members in (("train", train), ("val", val)):
        for number in members:
            label = partial / split / str(digits.target[number])
            label.mkdir(parents=True, exist_ok=True)
            samples = VALUES.to_bytes(digits.images[number])  # as the main command reads them back
            Image.fromarray(samples).save(label / f"{number:04d}.png")
    partial.rename(folder)


def baselines(data: Path) -> dict[str, float]:
    """Returns bits per dimension (8 * 8 of them) of the validation scans, without a neural network."""
    train, val = (VALUES.from_bytes(read_split(data / split, "L")[0]) for split in ("train", "val"))
    # How often each value occurs at each pixel in training, plus one.
    counts = np.ones((8, 8, VALUES.num_values))
    rows, columns = np.mgrid[:8, :8]
    for values in train:
        counts[rows, columns, values] += 1
    bits = -np.log2(counts / counts.sum(-1, keepdims=True))
    return {
        "uniform over 17 values": math.log2(VALUES.num_values),
        "per-pixel histogram": float(np.mean([bits[rows, columns, values] for values in val])),
        "xz, all in one file": 8 * len(lzma.compress(val.tobytes(), preset=9)) / val.size,
        **lossless_bits_per_dim(VALUES.to_bytes(val)),
    }


def save_model(run: Path, folder: Path) -> FractalGen:
    """Saves a run's trained model as a folder, for FractalGen.from_pretrained and the demos' --model."""
    model = FractalGen.from_pretrained(run)
    model.class_names = [str(digit) for digit in range(10)]
    model.sampling_defaults = replace(model.sampling_defaults, guidance_scale=2.0, temperature=1.2)
    model.save_pretrained(folder)
    return model


def enlarged(image: Image.Image) -> Image.Image:
    return image.resize(SHOWN, Image.Resampling.BICUBIC)


def edit_sheet(model: FractalGen, data: Path, results: int = 6) -> Image.Image:
    """Returns a sheet, two rows for each of `EDITS`: a validation scan, what is repainted, and results."""
    images, labels = read_split(data / "val", "L")
    shown, names = [], []
    for digit, (name, box, inside, change) in enumerate(EDITS * 2):
        image = images[labels == digit][digit]
        mask = box_mask(8, box).numpy() == inside
        target = (digit + change) % 10
        scan = Image.fromarray(image)
        edited = model.edit(scan, mask, target, num_results=results, seed=digit, progress_bar=False)
        hole = np.where(mask[..., None], (255, 0, 255), image[..., None]).astype(np.uint8)
        shown += [
            enlarged(scan), Image.fromarray(hole).resize(SHOWN, Image.Resampling.NEAREST),
            *map(enlarged, edited),
        ]  # fmt: skip
        names.append(f"{name}, {digit}" if target == digit else f"{name}, {digit} to {target}")
    return make_sheet(shown, columns=2 + results, row_labels=names)


def train(data: Path, run: Path, finished: Path, retrain: bool) -> None:
    """Trains unless the file `finished` exists, and goes on where an earlier call was stopped."""
    if retrain:
        shutil.rmtree(run, ignore_errors=True)
        finished.unlink(missing_ok=True)
    if finished.exists():
        print(f"trained already, see {run}; --retrain (make demo RETRAIN=1) trains again")
    else:
        run_main(f"{MODEL} {TRAINING} {SAMPLING}", data_path=data, output_dir=run, resume=run)
        finished.touch()


def evaluate(data: Path, run: Path) -> list[Image.Image]:
    """Prints scores of the trained model and of baselines. Returns samples, PER_CLASS for each digit."""
    paths = dict(data_path=data, output_dir=run, resume=run)
    scores = json.loads(run_main(f"{MODEL} --evaluate_nll", capture=True, **paths))
    print("\nbits per dimension of the validation scans (64 of them, 17 values each), fewer is better")
    for name, bits in baselines(data).items():
        print(f"  {name:<26}{bits:6.3f}")
    print(f"  {'this model, exact':<26}{scores['bits_per_dim']:6.3f}  +- {scores['standard_error']:.3f}\n")

    sampling = f"{SAMPLING} --evaluate_gen --num_images {10 * PER_CLASS} --gen_bsz 80"
    run_main(f"{MODEL} {sampling}", capture=True, **paths)
    images = [Image.open(path) for path in sorted((run / "generated").glob("*.png"))]
    share, accuracy = classify_by_regression(data, images)
    print(f"\na logistic regression, trained on the training scans, reads {share:.0%} of the samples as")
    print(f"the digit that they were drawn for, and {accuracy:.0%} of the validation scans right")
    return images


def main() -> None:
    parser = make_parser("digits.py", __doc__)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "digits")
    parser.add_argument("--retrain", action="store_true", help="train again from the start")
    args = parser.parse_args()
    with parser.one_line_errors():
        folder = make_writable(args.output_dir).resolve()
    data, run = folder / "data", folder / "run"
    start = time.perf_counter()
    if not data.exists():
        write_digits(data)
    train(data, run, folder / "trained", args.retrain)
    samples = [enlarged(image) for image in evaluate(data, run)]
    make_sheet(samples, PER_CLASS, row_labels=list("0123456789")).save(folder / "samples.png")
    edit_sheet(save_model(run, folder / "model"), data).save(folder / "edits.png")
    plot_curve(run / "log.txt", "FractalAR on scikit-learn's digits", folder / "loss.png")
    print(f"\nsamples, a row for each digit: {folder / 'samples.png'}")
    print(f"loss curve: {folder / 'loss.png'}")
    print(f"edits of validation scans: {folder / 'edits.png'}")
    print(f"the model, for --model of demo/edit.py and others: {folder / 'model'}")
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
