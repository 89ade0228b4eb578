"""What a model is held against: lossless files, a classifier without a network, its training images."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import read_split
from PIL import Image, ImageDraw, ImageOps

from util.pixels import make_sheet

NEAREST = 2  # training images shown beside each sample


def compressed_bits(image: np.ndarray, kind: str) -> int:
    """Returns the size in bits of a lossless file, "PNG" or "WEBP", with Pillow's best settings."""
    buffer = io.BytesIO()
    options = {"optimize": True} if kind == "PNG" else {"lossless": True, "quality": 100, "method": 6}
    Image.fromarray(image).save(buffer, kind, **options)
    return 8 * buffer.tell()


def sheet_of(images: np.ndarray) -> np.ndarray:
    """Lays uint8 images (n, H, W, …) side by side, in as many rows as columns; the last places are black."""
    n, *shape = images.shape
    columns = math.ceil(math.sqrt(n))
    sheet = np.zeros((columns * columns, *shape), np.uint8)
    sheet[:n] = images
    sheet = sheet.reshape(columns, columns, *shape).swapaxes(1, 2)
    return sheet.reshape(columns * shape[0], columns * shape[1], *shape[2:])


def lossless_bits_per_dim(images: np.ndarray) -> dict[str, float]:
    """Returns bits per dimension of uint8 images (n, side, side, …), RGB or grey, as lossless files.

    Each image is compressed as one PNG or WebP file, and then all images together as one sheet.
    """
    sheet = sheet_of(images)
    return {
        "PNG, one file per image": sum(compressed_bits(image, "PNG") for image in images) / images.size,
        "WebP, one file per image": sum(compressed_bits(image, "WEBP") for image in images) / images.size,
        "PNG, all in one sheet": compressed_bits(sheet, "PNG") / images.size,
        "WebP, all in one sheet": compressed_bits(sheet, "WEBP") / images.size,
    }


def nearest(images: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the training images nearest to each of n images.

    Returns their numbers (n, NEAREST), and root mean squared distances (n,) to the nearest, in values 0..255.
    """
    flat, others = (group.reshape(len(group), -1).astype(np.float32) for group in (images, train))
    squares = (flat**2).sum(1)[:, None] + (others**2).sum(1) - 2 * flat @ others.T
    order = squares.argsort(1)[:, :NEAREST]
    return order, np.sqrt(((flat - others[order[:, 0]]) ** 2).mean(1))


def draw_nearest(
    samples: Sequence[Image.Image], neighbours: np.ndarray, columns: int, row_labels: Sequence[str]
) -> Image.Image:
    """Lays out samples, framed, each followed by the training images nearest to it; `columns` of these a row.

    neighbours  uint8 (samples, NEAREST, side, side[, 3])
    """
    groups = []
    for sample, others in zip(samples, neighbours, strict=True):
        group = make_sheet([sample, *map(Image.fromarray, others)], columns=1 + len(others), zoom=2)
        side, gap = 2 * sample.width, 8
        ImageDraw.Draw(group).rectangle((0, 0, side - 1, side - 1), outline="#e8590c", width=2)
        groups.append(ImageOps.expand(group, (0, 0, gap, 0), "white"))
    title = "framed: generated; beside it the nearest training images"
    return make_sheet(groups, columns, row_labels=row_labels, title=title)


def classify_by_regression(data: Path, samples: Sequence[Image.Image]) -> tuple[float, float]:
    """Trains a logistic regression on the pixels of data/train, and classifies samples and data/val with it.

    samples  images in the order of their classes, equally many of each class

    Returns the share of samples that get the class they were drawn for, and the accuracy on data/val.
    """
    from sklearn.linear_model import LogisticRegression

    def flat(images) -> np.ndarray:
        return np.stack(images).reshape(len(images), -1) / 255

    (train, train_labels), (val, val_labels) = (read_split(data / split) for split in ("train", "val"))
    regression = LogisticRegression(max_iter=1000).fit(flat(train), train_labels)
    classes = train_labels.max() + 1
    wanted = np.repeat(np.arange(classes), len(samples) // classes)
    found = regression.predict(flat([np.asarray(image.convert("RGB")) for image in samples]))
    return float((found == wanted).mean()), float(regression.score(flat(val), val_labels))
