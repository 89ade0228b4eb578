"""The whole job on real scans: scikit-learn's handwritten digits through main_fractalgen.py, as ImageNet would go.

    python demo/digits.py [--output_dir output/digits] [--retrain]

Writes the digits as an image folder, trains a small FractalMAR, prints validation bits/dim beside baselines, samples
every class with guidance, repaints parts of held-out scans, and writes a sheet of each, the loss curve and the model.
Trains once; --retrain trains again.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from common import lossless_files, plot_curve, read_split, run_main, share_read_as_asked  # noqa: E402  need the paths above

from models import fractalgen  # noqa: E402
from models.sampling.edit import box_mask  # noqa: E402
from util import checkpoint  # noqa: E402
from util.pixels import make_sheet  # noqa: E402

PER_CLASS = 8
EDITS = (  # name; box x, y, width, height; is the box repainted, or all around it; to which class further on
    ("inpaint", (1, 2, 6, 3), True, 0),
    ("outpaint", (0, 0, 8, 4), False, 0),
    ("uncrop", (2, 2, 4, 4), False, 0),
    ("class edit", (0, 3, 8, 5), True, 5),
)
TRAIN = (
    "--model fractalmar_tiny_in8 --class_num 10 --no_flip --num_workers 0 --amp off --batch_size 16 --epochs 30 "
    "--warmup_epochs 2 --lr 4e-3 --attn_dropout 0 --proj_dropout 0 --label_drop_prob 0.2 --save_last_freq 10 "
    "--eval_freq 10 --cfg 3 --temperature 1.15"
)


def write_digits(folder: Path) -> None:
    """1,797 scans of 8 x 8 pixels and 17 greys as folder/{train,val}/<digit>/<number>.png, one fifth for validation."""
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
            levels = np.round(digits.images[number] * (255 / 16)).astype(np.uint8)
            Image.fromarray(levels).save(label / f"{number:04d}.png")
    partial.rename(folder)


def baselines(data: Path) -> dict[str, float]:
    """Bits per dimension of the validation images (RGB, 3 * 8 * 8 dimensions) by ways that need no network."""
    (train, _), (val, _) = read_split(data / "train"), read_split(data / "val")
    # How often each grey stood at each pixel in training, one added to all 256; G and B repeat R and cost nothing.
    counts = np.ones((8, 8, 256))
    rows, columns = np.mgrid[:8, :8]
    for image in train:
        counts[rows, columns, image[..., 0]] += 1
    bits = -np.log2(counts / counts.sum(-1, keepdims=True))
    histogram = np.mean([bits[rows, columns, image[..., 0]].sum() for image in val]) / val[0].size
    return {"uniform": 8.0, "per-pixel histogram": float(histogram), **lossless_files(val)}


def keep(run: Path, folder: Path) -> fractalgen.FractalGen:
    """The trained model as a folder for FractalGen.from_pretrained, and for demo/edit.py --model."""
    model, path = fractalgen.build("fractalmar_tiny_in8", class_num=10).eval(), checkpoint.locate(run)
    checkpoint.load_weights(model, checkpoint.load(path)["model"], path)
    model.class_names = [str(digit) for digit in range(10)]
    model.sampling_defaults = replace(model.sampling_defaults, guidance_scale=3.0, temperature=1.15)
    model.save_pretrained(folder)
    return model


def edit_sheet(model: fractalgen.FractalGen, data: Path, results: int = 6) -> Image.Image:
    """Two rows each of inpainting, outpainting, uncropping and another class: held-out scan, what is repainted, results."""
    images, labels = read_split(data / "val")
    shown, names = [], []
    for number, (name, box, inside, change) in enumerate(EDITS * 2):
        image, label = images[labels == number][number], number
        mask = box_mask(8, box).numpy() == inside
        asked = (label + change) % 10
        drawn = model.edit(image, mask, asked, num_results=results, seed=number, progress_bar=False)
        hole = np.where(mask[..., None], (255, 0, 255), image).astype(np.uint8)
        shown += [Image.fromarray(image), Image.fromarray(hole), *drawn]
        names.append(f"{name}, {label}" if asked == label else f"{name}, {label} to {asked}")
    return make_sheet(shown, columns=2 + results, zoom=8, row_labels=names)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "digits")
    parser.add_argument("--retrain", action="store_true", help="train again from the start")
    args = parser.parse_args()
    folder = args.output_dir
    data, run = folder / "data", folder / "run"
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    if not data.exists():
        write_digits(data)
    common = f"{TRAIN} --data_path {shlex.quote(str(data))} --output_dir {shlex.quote(str(run))}"
    if args.retrain:
        shutil.rmtree(run, ignore_errors=True)
    finished = folder / "trained"
    if not finished.exists() or args.retrain:
        finished.unlink(missing_ok=True)
        run_main(f"{common} --resume {shlex.quote(str(run))}")
        finished.touch()
    else:
        print(f"trained already, see {run}; --retrain (make demo RETRAIN=1) trains again")
    trained = f"{common} --resume {shlex.quote(str(run))}"
    scores = json.loads(run_main(f"{trained} --evaluate_nll --nll_forward_number 8", capture=True))
    print("\nbits per dimension of the validation images, fewer is better")
    for name, bits in baselines(data).items():
        print(f"  {name:<24}{bits:6.3f}")
    print(f"  {'this model':<24}{scores['bits_per_dim']:6.3f}  +- {scores['standard_error']:.3f}\n")

    run_main(f"{trained} --evaluate_gen --num_images {10 * PER_CLASS} --gen_bsz 80", capture=True)
    images = [Image.open(path) for path in sorted((run / "generated").glob("*.png"))]
    make_sheet(images, columns=PER_CLASS, zoom=8, row_labels=[str(label) for label in range(10)]).save(
        folder / "samples.png"
    )
    read, right = share_read_as_asked(data, images)
    print(
        f"a logistic regression on the training scans reads {read:.0%} of the samples as the digit asked for"
    )
    print(f"(and {right:.0%} of the validation scans right)")
    edit_sheet(keep(run, folder / "model"), data).save(folder / "edits.png")
    plot_curve(run / "log.txt", "FractalMAR on scikit-learn's digits", folder / "loss.png")
    print(f"\nsamples, a row for each digit: {folder / 'samples.png'}\nloss curve: {folder / 'loss.png'}")
    print(
        f"edits of held-out scans: {folder / 'edits.png'}\nthe model, for demo/edit.py and others: {folder / 'model'}"
    )
    print(f"done in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
