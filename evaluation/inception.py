"""The network of the scores: torch-fidelity's port of the Inception v3 that published FIDs use."""

import io
import re
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from urllib.error import URLError

import torch
from filelock import FileLock
from torch import Tensor

from util import checkpoint, download
from util.errors import UserError, one_line, reading
from util.files import check_archive, sha256
from util.precision import exact_float32

NAME = "inception-v3-compat"
URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
NEEDED = "scores need torch-fidelity 0.4 or newer: pip install -e '.[eval]'"


def require_fidelity() -> str:
    """Returns torch-fidelity's version. Raises UserError where it is missing or too old."""
    try:
        version = metadata.version("torch-fidelity")
    except metadata.PackageNotFoundError as error:
        raise UserError(NEEDED) from error
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (0, 4):
        raise UserError(f"{NEEDED}; version {version} is here")
    return version


def find_weights(file: str | Path | None) -> Path:
    """Returns the file of --inception_weights, or torch-fidelity's, downloaded once into torch's cache."""
    if file is not None:
        if not Path(file).is_file():
            raise UserError(f"--inception_weights {file}: no such file; it is {URL}")
        return Path(file)
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")):  # all processes of a job come here
            if not path.exists():
                part = path.with_name(f"{path.name}.part")
                download.fetch(URL, part)
                part.replace(path)
    except (URLError, HTTPException, OSError) as error:
        raise UserError(
            f"{URL}: cannot be fetched ({one_line(error)}); "
            "fetch it elsewhere and give --inception_weights FILE"
        ) from error
    return path


class Inception:
    """Maps images to features. `about` says which weights were loaded, as written to metrics.json.

    file  weights; None: torch-fidelity's, downloaded once
    """

    def __init__(self, file: str | Path | None, device: torch.device):
        version, path = require_fidelity(), find_weights(file)
        from torch_fidelity import FeatureExtractorInceptionV3

        try:
            check_archive(path)
            content = torch.load(path, map_location=lambda storage, _: storage, weights_only=True)
        except Exception as error:  # a hostile file can make the reader raise anything
            reason = one_line(str(error).split(". ")[0])
            raise UserError(f"{path}: refused as Inception weights ({reason}); they are {URL}") from error
        # torch-fidelity would run code hidden in the file: it gets a copy of what our reading let through.
        checked = io.BytesIO()
        torch.save(checkpoint.check_weights(content, path, "Inception weights"), checked)
        checked.seek(0)
        # Building the network draws from the generator that training uses.
        with reading(path, f"weights of another network than {URL}"), torch.random.fork_rng(devices=[]):
            network = FeatureExtractorInceptionV3(
                NAME, ["2048", "logits_unbiased"], feature_extractor_weights_path=checked
            )
        self.network, self.device = network.to(device), device
        self.about = {
            "name": f"{NAME} of torch-fidelity {version}",
            "weights": str(path),
            "weights_sha256": sha256(path),
        }

    @torch.inference_mode()
    def __call__(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values uint8 (N, 3, H, W) -> pool features (N, 2048) and logits without bias (N, 1008).

        Both are float32 on the host. Raises UserError where one is not finite.
        """
        with exact_float32():
            pool, logits = self.network(values.to(self.device, non_blocking=True))
        pool, logits = pool.cpu(), logits.cpu()  # sync
        if not (pool.isfinite().all() and logits.isfinite().all()):
            raise UserError(
                f"{self.about['weights']}: gives features that are not finite, it is damaged; get {URL}"
            )
        return pool, logits
