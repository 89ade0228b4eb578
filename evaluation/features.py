"""Features of a set of images, computed by all processes together, and their mean and covariance.

Letters: N images, H rows, W columns of an image, D features of an image, M images whose features are kept.
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

from evaluation.efficientnet import EfficientNetLite0
from evaluation.inception import Inception
from util import dist
from util.data.decode import to_mode
from util.data.folders import images_below, without_classes
from util.data.loader import open_split
from util.data.npz import Npz
from util.data.source import Source
from util.dist import World
from util.errors import UserError
from util.pixels import RGB, Alphabet

# Images in a batch, as in torch-fidelity. A batch holds the same images whatever the number of processes,
# so that the features are the same too.
BATCH = 64
BLOCK = 800 * BATCH  # images whose features are in memory together; 50,000 generated images are one block


@dataclass(frozen=True)
class Space:
    """The features of one network.

    name      of --features and in references
    dim       D
    distance  name of their Fréchet distance in metrics.json, and `title` the same for people
    """

    name: str
    dim: int
    distance: str
    title: str


INCEPTION = Space("inception", 2048, "fid", "FID")
EFFICIENTNET = Space("efficientnet_lite0", 1280, "fd_efficientnet_lite0", "FD-EfficientNetLite0")
SPACES = {space.name: space for space in (INCEPTION, EFFICIENTNET)}


class NpzImages(Source):
    """The images arr_0, uint8 (N, H, W, 3), of an npz file: the format of ADM's batches and samples."""

    def __init__(self, npz: Npz):
        dtype, shape = npz.arrays.get("arr_0", (None, ()))
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not all(shape):
            found = npz.describe("arr_0")
            raise UserError(f"{npz.path}: images must be arr_0, uint8 (N, H, W, 3), but arr_0 is {found}")
        super().__init__(f"npz images of {shape[2]} x {shape[1]} px", np.zeros(shape[0]), [])
        self.path, self.rows = npz.path, npz.array("arr_0")
        self.shape = shape[1:3] if shape[1] == shape[2] else None

    def name(self, index: int) -> str:
        return f"{self.path}: image {index}"

    def check(self, shape: tuple[int, ...], alphabet: Alphabet) -> None:
        if self.shape not in (None, shape):
            raise UserError(f"these {self.kind} are not of {shape[0]} px; give --img_size {self.shape[0]}")

    def image(self, index: int, mode: str = "RGB") -> Image.Image:
        return to_mode(Image.fromarray(self.rows[index]), mode)


def open_images(path: Path, split: str | None = None) -> Source:
    """Opens a folder of images (also in its subfolders), an npz file with arr_0, or a split of a data set.

    path   an existing file or folder; with `split`, a data set as --data_path takes
    split  "train" or "val" of a data set
    """
    if split is not None:
        return open_split(path, split)
    if path.is_file():
        return NpzImages(Npz(path))
    paths = images_below(path)
    if not paths:
        raise UserError(f"{path}: there is no image in it; for a data set of another kind give --split")
    return without_classes(paths)


class Prepared(Dataset):
    """The images of a source for a network. Items: values uint8 (3, H, W) and their SHA-256 as bytes.

    Grey values are repeated for R, G and B.

    size  side in pixels after the ADM crop; None: no crop, and all images must have one size
    """

    def __init__(self, source: Source, size: int | None):
        self.source, self.shape = source, (size, size) if size else source.shape
        held = source.alphabet
        is_grey = held is not None and held.channels == 1 and self.shape and held.is_image(self.shape)
        self.alphabet = held if is_grey and held.is_ordinal else RGB
        if self.shape:
            source.check(self.shape, self.alphabet)
        self.first = None if self.shape else source.image(0).size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, bytes]:
        if self.shape:
            cells = self.source.cells(index, self.shape, self.alphabet).numpy()
            values = torch.from_numpy(self.alphabet.to_bytes(cells)).expand(3, -1, -1).contiguous()
        else:
            image = self.source.image(index)
            if image.size != self.first:
                found, first = (f"{width} x {height}" for width, height in (image.size, self.first))
                raise UserError(
                    f"{self.source.name(index)}: {found} px, the first has {first}; "
                    "give --img_size to crop all"
                )
            values = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return values, hashlib.sha256(values.numpy().tobytes()).digest()


def crop_name(size: int | None) -> str | None:
    """The crop as metrics.json and the notes of references name it."""
    return f"ADM, {size} px" if size else None


@dataclass
class Measured:
    """What scores need of a set of images, generated or real.

    mu, sigma  mean (D,) and covariance (D, D) of the features of all images, float64
    features   (M, D) float32, in the order of the images; None: only mu and sigma are known
    logits     (M, classes of the network) float32; None where they are not known
    about      where the images come from, as written to metrics.json
    """

    mu: np.ndarray
    sigma: np.ndarray
    features: Tensor | None
    logits: Tensor | None
    about: dict


@dataclass(frozen=True)
class Measurer:
    """Computes the features of sets of images, all in the same way.

    size         side in pixels of the ADM crop; None: no crop
    num_workers  data workers of each process
    space        what the features of `network` are called
    """

    network: Inception | EfficientNetLite0
    world: World
    size: int | None = None
    num_workers: int = 0
    space: Space = INCEPTION

    def measure(self, path: Path, split: str | None = None, keep: int | None = None) -> Measured | None:
        """Measures all images of `path` (see `open_images`). Returns None on all but the first process.

        keep  features and logits are kept of at most this many images, chosen with seed 0; default: of all
        """
        source = open_images(path, split)
        dataset, count = Prepared(source, self.size), len(source)
        if count < 2:
            raise UserError(f"{source.name(0)}: a score needs at least 2 images")
        kept = np.sort(np.random.default_rng(0).permutation(count)[:keep])
        statistics, pools, logits, digest = None, [], [], hashlib.sha256()
        for first in range(0, count, BLOCK):
            block = range(first, min(first + BLOCK, count))
            pool, block_logits, digests = self._extract(dataset, block)
            if self.world.is_main:
                digest.update(digests)
                statistics = merge(statistics, (len(block), *gaussian(pool)))
                chosen = kept[(kept >= block.start) & (kept < block.stop)] - first
                pools.append(pool[chosen])
                logits.append(block_logits[chosen])
        if not self.world.is_main:
            return None
        about = {"path": str(path), "kind": source.kind, "pictures": count, "crop": crop_name(self.size)}
        about["pictures_sha256"] = digest.hexdigest()
        return Measured(*statistics[1:], torch.cat(pools), torch.cat(logits), about)

    def _extract(self, dataset: Prepared, images: range) -> tuple[Tensor, Tensor, bytes]:
        """Features, logits and SHA-256 of a range of images, in order, on every process."""
        batches = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
        own = batches[self.world.rank :: self.world.size]
        loader = DataLoader(
            dataset, batch_sampler=own, num_workers=self.num_workers, generator=torch.Generator()
        )
        progress = tqdm(
            loader,
            desc=f"features of images {images.start} to {images.stop - 1}",
            unit="image",
            unit_scale=BATCH * self.world.size,
            disable=None if self.world.is_main else True,  # None: shown on a terminal only
        )
        rows = [
            (batch.start, *self.network(values), b"".join(digests))
            for batch, (values, digests) in zip(own, progress, strict=True)
        ]
        rows = sorted(row for part in dist.gather(rows) for row in part)
        _, pools, logits, digests = zip(*rows, strict=True)
        return torch.cat(pools), torch.cat(logits), b"".join(digests)


def gaussian(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D), float64, of features (N, D) float32.

    By torch-fidelity, which sums the mean in float32, as ADM's script does, and the covariance in float64.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics

    if len(features) == 1:  # the last block of a large set
        return features[0].double().numpy(), np.zeros((features.shape[1],) * 2)
    statistics = fid_features_to_statistics(features)
    return statistics["mu"].astype(np.float64), statistics["sigma"].astype(np.float64)


def merge(a: tuple | None, b: tuple) -> tuple[int, np.ndarray, np.ndarray]:
    """(count, mean, covariance) of two sets -> of their union (Chan, Golub and LeVeque 1979).

    a  None: the empty set
    """
    if a is None:
        return b
    (n, mu_a, sigma_a), (m, mu_b, sigma_b) = a, b
    apart, total = mu_b - mu_a, n + m
    between = np.outer(apart, apart) * (n * m / total)
    return total, mu_a + apart * (m / total), ((n - 1) * sigma_a + (m - 1) * sigma_b + between) / (total - 1)
