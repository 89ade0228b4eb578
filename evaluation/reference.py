"""What generated images are scored against: ADM's reference batches, any mu and sigma, or statistics of our own making."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.features import NpzImages, crop_name, measure, open_images
from evaluation.inception import Inception
from evaluation.npz import Npz
from util.dist import World
from util.errors import UserError
from util.files import atomic_write, sha256

DIM = 2048  # of the pool features
SAMPLE = 10_000  # images for KID, precision and recall, as in the paper's table
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/{0}/VIRTUAL_imagenet{0}_labeled.npz"
WHERE = f"get {ADM.format(64)} (64 px) or {ADM.format(256)} (256 px), or make one: python -m evaluation.score DATA --make_reference FILE"


@dataclass
class Reference:
    """mu (D,) and sigma (D, D) float64 of all images; features (M, D) float32 of at most SAMPLE of them, if it has any;
    about: where it comes from, as metrics.json has it."""

    mu: np.ndarray
    sigma: np.ndarray
    features: Tensor | None
    about: dict


def open_reference(
    path: Path,
    inception: Inception,
    world: World,
    *,
    size: int | None = None,
    split: str | None = None,
    num_workers: int = 0,
) -> Reference | None:
    """A reference npz; or a folder or data set, measured now after the ADM crop to `size`. None on all but the first process.

    Raises UserError that says where to get one, or what is wrong with this one.
    """
    if not path.exists():
        raise UserError(f"{path}: no such reference; {WHERE}")
    if path.is_dir():
        found = measure(
            open_images(path, split), size, inception, world, keep=SAMPLE, num_workers=num_workers
        )
        return found and Reference(found.mu, found.sigma, found.features, {"path": str(path), **found.about})
    npz = Npz(path)
    statistics = read_statistics(npz) if "mu" in npz or "sigma" in npz else None
    about, features = {"path": str(path), "sha256": sha256(path)}, None
    if "features" in npz:
        about["made"] = read_note(path, inception, size, about["sha256"])
        about["pictures"] = about["made"]["pictures"]
        features = torch.from_numpy(read(npz, "features", (npz.shapes["features"][0], DIM), np.float32))
    elif "arr_0" in npz:
        found = measure(NpzImages(npz), size, inception, world, keep=SAMPLE, num_workers=num_workers)
        if found is None:
            return None
        about |= {"fid_against": "mu and sigma of the file" if statistics else "these images", **found.about}
        statistics, features = statistics or (found.mu, found.sigma), found.features
    if statistics is None:
        raise UserError(
            f"{path}: a reference has mu and sigma, or images as arr_0, but this has {', '.join(npz.shapes)}"
        )
    return Reference(*statistics, features, about)


def read_statistics(npz: Npz) -> tuple[np.ndarray, np.ndarray]:
    return read(npz, "mu", (DIM,), np.float64), read(npz, "sigma", (DIM, DIM), np.float64)


def read(npz: Npz, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An array of finite numbers of that shape, cast. What torch-fidelity takes must agree in dtype."""
    found = npz.shapes.get(name)
    if found != shape or npz.dtypes[name].kind != "f":
        what = f"is {npz.dtypes[name]} {found}" if found is not None else "is missing"
        raise UserError(f"{npz.path}: {name} {what}, it must be floats {shape}; {WHERE}")
    values = npz.array(name).astype(dtype)
    if not np.isfinite(values).all():
        raise UserError(f"{npz.path}: {name} holds numbers that are not finite; get it again")
    return values


def read_note(path: Path, inception: Inception, size: int | None, found_sha256: str) -> dict:
    """The JSON beside a reference of our own making. Raises UserError where its features cannot be compared with ours."""
    note_path = path.with_suffix(".json")
    try:
        note = json.loads(note_path.read_text(encoding="utf-8"))
        extractor, crop, of = note["extractor"]["weights_sha256"], note["crop"], note["npz_sha256"]
        note["pictures"] = int(note["pictures"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{note_path}: the note that belongs to {path.name} is missing or damaged; make both again"
        ) from error
    if of != found_sha256:
        raise UserError(f"{path}: is not the file that {note_path.name} describes; make both again")
    if extractor != inception.about["weights_sha256"]:
        raise UserError(
            f"{path}: was made with other Inception weights (sha256 {extractor}); give those or make it again"
        )
    if size and crop and crop != crop_name(size):
        raise UserError(
            f"{path}: its images were cropped to {crop}, these are {size} px; make one of {size} px"
        )
    return note


def make_reference(
    data: Path,
    out: Path,
    inception: Inception,
    world: World,
    *,
    size: int | None,
    split: str | None,
    num_workers: int,
) -> dict | None:
    """Writes statistics of `data` to `out` (npz) and what they are of beside it (JSON), which the first process returns."""
    found = measure(open_images(data, split), size, inception, world, keep=SAMPLE, num_workers=num_workers)
    if found is None:
        return None
    try:
        with atomic_write(out) as temporary, open(temporary, "wb") as file:
            np.savez(file, mu=found.mu, sigma=found.sigma, features=found.features.numpy())
        note = {"made_of": str(data), "split": split, **found.about, "features": len(found.features)}
        note |= {"extractor": inception.about, "npz_sha256": sha256(out)}
        with atomic_write(out.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    return note
