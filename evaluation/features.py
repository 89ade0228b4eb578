"""Inception features of a set of images, measured by all processes together, and their statistics.

Letters: N images, H rows, W columns of an image.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from evaluation.inception import Inception
from evaluation.npz import Npz
from util import dist
from util.data.folders import images_below, without_classes
from util.data.loader import open_split
from util.data.source import Source
from util.dist import World
from util.errors import UserError

BATCH = 64  # torch-fidelity's; a batch has the same images on any number of processes, so its features are the same too
BLOCK = 800 * BATCH  # images whose features are in memory together; 50,000 generated ones are one block


class NpzImages(Source):
    """arr_0, uint8 (N, H, W, 3), as ADM's reference batches and samples have it."""

    def __init__(self, npz: Npz):
        shape, dtype = npz.shapes.get("arr_0"), npz.dtypes.get("arr_0")
        if shape is None or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not all(shape):
            found = (
                f"arr_0 is {dtype} {shape}"
                if shape is not None
                else f"it has {', '.join(npz.shapes) or 'no arrays'}"
            )
            raise UserError(f"{npz.path}: images must be arr_0, uint8 (N, H, W, 3), but {found}")
        super().__init__(f"npz images of {shape[2]} x {shape[1]} px", np.zeros(shape[0]), [])
        self.path, self.rows = npz.path, npz.rows("arr_0")
        self.img_size = shape[1] if shape[1] == shape[2] else None

    def name(self, index: int) -> str:
        return f"{self.path}: image {index}"

    def image(self, index: int, at_least: int | None = None) -> Image.Image:
        return Image.fromarray(self.rows[index])


def open_images(path: Path, split: str | None = None) -> Source:
    """A folder of images (with those in its folders), an npz with arr_0, or a split of what --data_path takes."""
    if split is not None:
        return open_split(path, split)
    if path.is_file():
        return NpzImages(Npz(path))
    if not path.is_dir():
        raise UserError(f"{path}: no such folder of images or npz file")
    paths = images_below(path)
    if not paths:
        raise UserError(f"{path}: there is no image in it; of a data set of another kind say which --split")
    return without_classes(paths)


class Prepared(Dataset):
    """Items: levels uint8 (3, H, W), after the ADM crop to `size` or, without one, as they are; and their SHA-256."""

    def __init__(self, source: Source, size: int | None):
        self.source, self.size = source, size or source.img_size
        if source.img_size not in (None, self.size):
            raise UserError(
                f"these {source.kind} are no images of {size} px; give --img_size {source.img_size}"
            )
        self.expected = None if self.size else source.image(0).size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.size:
            levels = self.source.levels(index, self.size)
        else:
            image = self.source.image(index)
            if image.size != self.expected:
                w, h = image.size
                raise UserError(
                    f"{self.source.name(index)}: {w} x {h} px, the first has {self.expected[0]} x {self.expected[1]}; "
                    "give --img_size to crop all"
                )
            levels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        digest = hashlib.sha256(levels.numpy().tobytes()).digest()
        return levels, torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def crop_name(size: int | None) -> str | None:
    return f"ADM, {size} px" if size else None


@dataclass
class Measured:
    """What scores need of a set of images.

    mu, sigma  mean (D,) and covariance (D, D) of the pool features of all images, float64
    features   (M, D) float32, of the images that were kept, in order; logits (M, 1008) float32
    about      where they came from: as metrics.json has it
    """

    mu: np.ndarray
    sigma: np.ndarray
    features: Tensor | None
    logits: Tensor | None
    about: dict


def measure(
    source: Source,
    size: int | None,
    inception: Inception,
    world: World,
    *,
    keep: int | None = None,
    num_workers: int = 0,
    progress_bar: bool = True,
) -> Measured | None:
    """Features of all images of a source, on the first process; on the others None.

    keep: of so many images, drawn with seed 0, features and logits are kept; default: of all.
    """
    dataset, count = Prepared(source, size), len(source)
    if count < 2:
        raise UserError(f"{source.name(0)}: a score needs at least 2 images")
    kept = np.arange(count)
    if keep is not None and keep < count:
        kept = np.sort(np.random.default_rng(0).permutation(count)[:keep])
    statistics, pools, logits, digest = None, [], [], hashlib.sha256()
    with tqdm(
        total=count, desc="features", unit="image", disable=None if progress_bar and world.is_main else True
    ) as bar:
        for first in range(0, count, BLOCK):
            block = extract(
                dataset, range(first, min(first + BLOCK, count)), inception, world, num_workers, bar
            )
            if world.is_main:
                digest.update(block[2].numpy().tobytes())
                statistics = merge(statistics, (len(block[0]), *gaussian(block[0])))
                mine = kept[np.searchsorted(kept, first) : np.searchsorted(kept, first + BLOCK)] - first
                pools.append(block[0][mine])
                logits.append(block[1][mine])
    if not world.is_main:
        return None
    about = {"kind": source.kind, "pictures": count, "crop": crop_name(size)}
    about["pictures_sha256"] = digest.hexdigest()
    return Measured(*statistics[1:], torch.cat(pools), torch.cat(logits), about)


def extract(
    dataset: Prepared, images: range, inception: Inception, world: World, num_workers: int, bar: tqdm
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool features, logits and SHA-256 (uint8) of a range of images, in order, on every process."""
    batches = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
    mine = batches[world.rank :: world.size]
    loader = DataLoader(dataset, batch_sampler=mine, num_workers=num_workers, generator=torch.Generator())
    rows = []
    for batch, (levels, digests) in zip(mine, loader, strict=True):
        rows.append((batch.start, *inception(levels), digests))
        bar.update(min(len(batch) * world.size, bar.total - bar.n))
    gathered = sorted((row for part in dist.gather(rows) for row in part), key=lambda row: row[0])
    return tuple(torch.cat(column) for column in list(zip(*gathered, strict=True))[1:])


def gaussian(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of (N, D) by torch-fidelity, which adds up the mean in float32, as ADM's script does, and the
    covariance in float64; then both float64."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    if len(features) == 1:  # the rest of a large set
        return features[0].double().numpy(), np.zeros((features.shape[1],) * 2)
    statistics = fid_features_to_statistics(features)
    return statistics["mu"].astype(np.float64), statistics["sigma"].astype(
        np.float64
    )  # their dtypes must agree


def merge(a: tuple | None, b: tuple) -> tuple[int, np.ndarray, np.ndarray]:
    """(count, mean, covariance) of two sets -> of both together (Chan, Golub and LeVeque 1979)."""
    if a is None:
        return b
    (n, mu_a, sigma_a), (m, mu_b, sigma_b) = a, b
    apart, total = mu_b - mu_a, n + m
    between = np.outer(apart, apart) * (n * m / total)
    return total, mu_a + apart * (m / total), ((n - 1) * sigma_a + (m - 1) * sigma_b + between) / (total - 1)
