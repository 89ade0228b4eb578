"""What the demos share: the command line called as a user would, lossless files as baselines, a reader of samples, plots."""

import io
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def run_main(flags: str, capture: bool = False) -> str:
    """main_fractalgen.py in a process of its own, its command line shown. Returns its standard output if captured."""
    command = [sys.executable, str(ROOT / "main_fractalgen.py"), *shlex.split(flags)]
    print("$ python main_fractalgen.py", flags, flush=True)
    result = subprocess.run(
        command, cwd=ROOT, check=False, stdout=subprocess.PIPE if capture else None, text=True
    )
    if result.returncode:
        raise SystemExit(result.returncode)
    return result.stdout


def read_split(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All folder/CLASS/*.png of one size, uint8 (n, side, side, 3), and their labels (n,): numbers of the sorted classes."""
    paths = sorted(folder.glob("*/*.png"))
    classes = sorted({path.parent.name for path in paths})
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    return np.stack(images), np.array([classes.index(path.parent.name) for path in paths])


def compressed(image: np.ndarray, kind: str) -> int:
    """Bits of a lossless file, by Pillow's best settings."""
    buffer = io.BytesIO()
    options = {"optimize": True} if kind == "PNG" else {"lossless": True, "quality": 100, "method": 6}
    Image.fromarray(image).save(buffer, kind, **options)
    return 8 * buffer.tell()


def lossless_files(images: np.ndarray) -> dict[str, float]:
    """Bits per dimension of images (n, side, side, 3) as PNG and WebP: a file each, and all in one sheet."""
    n, side = images.shape[:2]
    columns = math.ceil(math.sqrt(n))
    sheet = np.zeros((columns * columns, side, side, 3), np.uint8)
    sheet[:n] = images
    sheet = (
        sheet.reshape(columns, columns, side, side, 3)
        .swapaxes(1, 2)
        .reshape(columns * side, columns * side, 3)
    )
    return {
        "PNG, a file an image": sum(compressed(image, "PNG") for image in images) / images.size,
        "WebP, a file an image": sum(compressed(image, "WEBP") for image in images) / images.size,
        "PNG, all in one sheet": compressed(sheet, "PNG") / images.size,
        "WebP, all in one sheet": compressed(sheet, "WEBP") / images.size,
    }


def share_read_as_asked(data: Path, samples: Sequence[Image.Image]) -> tuple[float, float]:
    """A logistic regression of the training images' pixels reads the samples, as many for each class, in order.

    Returns the share of samples read as the class that was asked for, and of validation images read right.
    """
    from sklearn.linear_model import LogisticRegression

    (train, train_labels), (val, val_labels) = (read_split(data / split) for split in ("train", "val"))
    flat = lambda images: np.stack(images).reshape(len(images), -1) / 255  # noqa: E731
    reader = LogisticRegression(max_iter=1000).fit(flat(train), train_labels)
    classes = train_labels.max() + 1
    asked = np.repeat(np.arange(classes), len(samples) // classes)
    drawn = [np.asarray(image) for image in samples]
    return float((reader.predict(flat(drawn)) == asked).mean()), float(reader.score(flat(val), val_labels))


def plot_curve(log: Path, title: str, output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in log.read_text().splitlines()]
    _, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, label, style in (
        ("train/loss", "training loss, nats (weighted)", "-"),
        ("val/bits_per_dim", "validation, bits/dim", "o-"),
    ):
        points = [(record["step"], record[name]) for record in records if name in record]
        axis.plot(*zip(*points, strict=True), style, label=label)
    axis.set(xlabel="step", yscale="log", title=title)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    pyplot.savefig(output, dpi=110)
