"""The whole job on real scans: scikit-learn's handwritten digits through main_fractalgen.py, as ImageNet would go.

    python demo/digits.py [--output_dir output/digits] [--retrain]

Writes the digits as an image folder, trains a small FractalMAR, prints validation bits/dim beside baselines, samples
every class with guidance, and writes a labelled sheet and the loss curve. Trains once; --retrain trains again.
"""

import argparse
import io
import json
import math
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from util.visualize import make_sheet  # noqa: E402  needs the path above when the package is not installed

PER_CLASS = 8
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


def read_split(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All pictures of a split, uint8 (n, 8, 8, 3), and their labels (n,)."""
    paths = sorted(folder.glob("*/*.png"))
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    return np.stack(pictures), np.array([int(path.parent.name) for path in paths])


def baselines(data: Path) -> dict[str, float]:
    """Bits per dimension of the validation pictures (RGB, 3 * 8 * 8 dimensions) by ways that need no network."""
    (train, _), (val, _) = read_split(data / "train"), read_split(data / "val")
    # How often each grey stood at each pixel in training, one added to all 256; G and B repeat R and cost nothing.
    counts = np.ones((8, 8, 256))
    rows, columns = np.mgrid[:8, :8]
    for picture in train:
        counts[rows, columns, picture[..., 0]] += 1
    bits = -np.log2(counts / counts.sum(-1, keepdims=True))
    histogram = np.mean([bits[rows, columns, picture[..., 0]].sum() for picture in val]) / val[0].size
    side = math.ceil(math.sqrt(len(val)))
    sheet = np.zeros((side * side, 8, 8, 3), np.uint8)
    sheet[: len(val)] = val
    sheet = sheet.reshape(side, side, 8, 8, 3).swapaxes(1, 2).reshape(side * 8, side * 8, 3)
    return {
        "uniform": 8.0,
        "per-pixel histogram": float(histogram),
        "PNG, a file a picture": np.mean([compressed(picture, "PNG") for picture in val]),
        "WebP, a file a picture": np.mean([compressed(picture, "WEBP") for picture in val]),
        "PNG, all in one sheet": compressed(sheet, "PNG"),
        "WebP, all in one sheet": compressed(sheet, "WEBP"),
    }


def share_read_as_asked(data: Path, samples: list[Image.Image]) -> tuple[float, float]:
    """A logistic regression of the training scans' pixels reads the samples, PER_CLASS for each digit in order.

    Returns the share of samples read as the digit that was asked for, and of validation scans read right.
    """
    from sklearn.linear_model import LogisticRegression

    (train, train_labels), (val, val_labels) = (read_split(data / split) for split in ("train", "val"))
    grey = lambda pictures: np.stack(pictures)[..., 0].reshape(len(pictures), -1) / 255  # noqa: E731
    reader = LogisticRegression(max_iter=1000).fit(grey(train), train_labels)
    asked = np.repeat(np.arange(10), PER_CLASS)
    drawn = [np.asarray(picture) for picture in samples]
    return float((reader.predict(grey(drawn)) == asked).mean()), float(reader.score(grey(val), val_labels))


def compressed(picture: np.ndarray, kind: str) -> float:
    """Bits per dimension of a lossless file."""
    buffer = io.BytesIO()
    options = {"optimize": True} if kind == "PNG" else {"lossless": True, "quality": 100, "method": 6}
    Image.fromarray(picture).save(buffer, kind, **options)
    return 8 * buffer.tell() / picture.size


def run_main(flags: str, capture: bool = False) -> str:
    """main_fractalgen.py in a process of its own, its command line shown. Returns its standard output if captured."""
    command = [sys.executable, str(ROOT / "main_fractalgen.py"), *shlex.split(flags)]
    print("$ python main_fractalgen.py", flags, flush=True)
    result = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE if capture else None, text=True)
    if result.returncode:
        raise SystemExit(result.returncode)
    return result.stdout


def plot_curve(log: Path, output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in log.read_text().splitlines()]
    _, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, label, style in (
        ("train/loss", "training loss, nats (R counts five times)", "-"),
        ("val/bits_per_dim", "validation, bits/dim", "o-"),
    ):
        points = [(record["step"], record[name]) for record in records if name in record]
        axis.plot(*zip(*points, strict=True), style, label=label)
    axis.set(xlabel="step", yscale="log", title="FractalMAR on scikit-learn's digits")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    pyplot.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    print("\nbits per dimension of the validation pictures, fewer is better")
    for name, bits in baselines(data).items():
        print(f"  {name:<24}{bits:6.3f}")
    print(f"  {'this model':<24}{scores['bits_per_dim']:6.3f}  +- {scores['standard_error']:.3f}\n")

    run_main(f"{trained} --evaluate_gen --num_images {10 * PER_CLASS} --gen_bsz 80", capture=True)
    pictures = [Image.open(path) for path in sorted((run / "generated").glob("*.png"))]
    make_sheet(pictures, columns=PER_CLASS, zoom=8, row_labels=[str(label) for label in range(10)]).save(folder / "samples.png")
    read, right = share_read_as_asked(data, pictures)
    print(f"a logistic regression on the training scans reads {read:.0%} of the samples as the digit asked for")
    print(f"(and {right:.0%} of the validation scans right)")
    plot_curve(run / "log.txt", folder / "loss.png")
    print(f"\nsamples, a row for each digit: {folder / 'samples.png'}\nloss curve: {folder / 'loss.png'}")
    print(f"done in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
