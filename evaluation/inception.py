"""The network that scores are measured with: torch-fidelity's port of the Inception v3 that all published FIDs use."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from urllib.error import URLError

import torch
from filelock import FileLock
from torch import Tensor

from util import checkpoint, download
from util.errors import UserError, one_line
from util.files import sha256

NAME = "inception-v3-compat"
NEEDED = "scores need torch-fidelity 0.4 or newer: pip install -e '.[eval]'"


def require_fidelity() -> str:
    """torch-fidelity's version. Raises UserError where it is missing, or older than what these calls were held against."""
    try:
        version = metadata.version("torch-fidelity")
    except metadata.PackageNotFoundError as error:
        raise UserError(NEEDED) from error
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (0, 4):
        raise UserError(f"{NEEDED}; version {version} is here")
    return version


def find_weights(file: str | Path | None) -> Path:
    """The file of --inception_weights, or else torch-fidelity's, fetched once into torch's cache."""
    if file is not None:
        if not Path(file).is_file():
            raise UserError(f"--inception_weights {file}: no such file; it is {_url()}")
        return Path(file)
    path = Path(torch.hub.get_dir()) / "checkpoints" / _url().rpartition("/")[2]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")):  # processes of one job all call this
            if not path.exists():
                part = path.with_name(f"{path.name}.part")
                download.fetch(_url(), part)
                part.replace(path)
    except (URLError, HTTPException, OSError) as error:
        raise UserError(
            f"{_url()}: cannot be fetched ({one_line(error)}); fetch it elsewhere and give --inception_weights FILE"
        ) from error
    return path


def _url() -> str:
    require_fidelity()
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return URL_INCEPTION_V3


class Inception:
    """Levels uint8 (N, 3, H, W) -> pool features (N, 2048) and unbiased logits (N, 1008), both float32 on the host. Raises
    UserError where one is not finite.

    weights  the file, about what was loaded: `about`, as metrics.json has it
    """

    def __init__(self, file: str | Path | None, device: torch.device):
        version, path = require_fidelity(), find_weights(file)
        from torch_fidelity import FeatureExtractorInceptionV3

        try:
            content = torch.load(path, map_location=lambda storage, _: storage, weights_only=True)
        except Exception as error:  # a hostile file decides what the reader stumbles over
            reason = str(error).split(". ")[0]
            raise UserError(
                f"{path}: refused as Inception weights ({one_line(reason)}); they are {_url()}"
            ) from error
        ours = (
            io.BytesIO()
        )  # torch-fidelity's own loading would run code hidden in the file: it gets what passed ours
        torch.save(checkpoint.check_weights(content, path, "Inception weights"), ours)
        ours.seek(0)
        with torch.random.fork_rng(devices=[]):  # building draws from the generator that training uses
            try:
                self.network = FeatureExtractorInceptionV3(
                    NAME, ["2048", "logits_unbiased"], feature_extractor_weights_path=ours
                ).to(device)
            except RuntimeError as error:
                raise UserError(
                    f"{path}: weights of another network than {_url()} ({one_line(error)})"
                ) from error
        self.device = device
        self.about = {
            "name": f"{NAME} of torch-fidelity {version}",
            "weights": str(path),
            "weights_sha256": sha256(path),
        }

    @torch.inference_mode()
    def __call__(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        with _float32():
            pool, logits = self.network(levels.to(self.device, non_blocking=True))
        pool, logits = pool.cpu(), logits.cpu()  # sync
        if not (pool.isfinite().all() and logits.isfinite().all()):
            raise UserError(
                f"{self.about['weights']}: gives features that are not finite, it is damaged; get {_url()}"
            )
        return pool, logits


@contextmanager
def _float32() -> Iterator[None]:
    """No TF32: scores shall not depend on the device more than they must."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
