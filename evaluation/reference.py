"""What images are scored against: ADM's batches, mu and sigma, images, or statistics that we have made."""

import json
from pathlib import Path

import numpy as np
import torch

from evaluation.features import Measured, Measurer, crop_name
from evaluation.npz import Npz
from util.errors import UserError, reading
from util.files import atomic_write, sha256, write_json

DIM = 2048  # features of an image
SAMPLE = 10_000  # images for KID, precision and recall, as in the paper's table
ADM = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/{0}"
    "/VIRTUAL_imagenet{0}_labeled.npz"
)
WHERE = (
    f"get {ADM.format(64)} (64 px) or {ADM.format(256)} (256 px), "
    "or make one: python -m evaluation.score DATA --make_reference FILE"
)


def open_reference(path: Path, measurer: Measurer, split: str | None = None) -> Measured | None:
    """Reads a reference npz, or measures images and keeps the features of SAMPLE of them.

    path   an existing npz file, a folder of images, or, with `split`, a data set

    Returns None on all but the first process where images are measured. Raises UserError that says what is
    wrong with the file, or where to get a good one.
    """
    if path.is_dir():
        return measurer.measure(path, split, keep=SAMPLE)
    npz, digest, found = Npz(path), sha256(path), None
    names = npz.arrays.keys()
    if names & {"mu", "sigma", "features"}:
        mu, sigma = read(npz, "mu", (DIM,), np.float64), read(npz, "sigma", (DIM, DIM), np.float64)
        found = Measured(mu, sigma, None, None, {"path": str(path), "sha256": digest})
    elif "arr_0" not in names:
        listed = ", ".join(names)
        raise UserError(f"{path}: a reference has mu and sigma, or images as arr_0, but this has {listed}")
    if "features" in names:
        note = read_note(path, measurer, digest)
        found.about |= {"made": note, "pictures": note["pictures"]}
        count = npz.arrays["features"][1][0]
        found.features = torch.from_numpy(read(npz, "features", (count, DIM), np.float32))
    elif "arr_0" in names:
        measured = measurer.measure(path, keep=SAMPLE)
        if measured is None:
            return None
        against = "these images" if found is None else "mu and sigma of the file"
        measured.about |= {"sha256": digest, "fid_against": against}
        if found is not None:
            measured.mu, measured.sigma = found.mu, found.sigma
        return measured
    return found


def read(npz: Npz, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Reads an array of finite numbers of that shape, as `dtype`: torch-fidelity wants one for both sides."""
    found, found_shape = npz.arrays.get(name, (None, None))
    if found_shape != shape or found.kind != "f":
        raise UserError(f"{npz.path}: {name} is {npz.describe(name)}, it must be floats {shape}; {WHERE}")
    values = npz.array(name).astype(dtype)
    if not np.isfinite(values).all():
        raise UserError(f"{npz.path}: {name} holds numbers that are not finite; get it again")
    return values


def read_note(path: Path, measurer: Measurer, digest: str) -> dict:
    """Reads the JSON file beside a reference that we have made, whose SHA-256 is `digest`.

    Raises UserError where the features of the reference cannot be compared with those of `measurer`.
    """
    note_path, size = path.with_suffix(".json"), measurer.size
    problem = f"the note that belongs to {path.name} is missing or damaged"
    with reading(note_path, problem, "; make both again"):
        note = json.loads(note_path.read_text(encoding="utf-8"))
        weights, crop, described = note["extractor"]["weights_sha256"], note["crop"], note["npz_sha256"]
        note["pictures"] = int(note["pictures"])
    if described != digest:
        raise UserError(f"{path}: is not the file that {note_path.name} describes; make both again")
    if weights != measurer.inception.about["weights_sha256"]:
        raise UserError(
            f"{path}: was made with other Inception weights (sha256 {weights}); give those or make it again"
        )
    if size and crop and crop != crop_name(size):
        raise UserError(
            f"{path}: its images were cropped to {crop}, these are {size} px; make one of {size} px"
        )
    return note


def make_reference(data: Path, out: Path, measurer: Measurer, split: str | None = None) -> dict | None:
    """Writes statistics of the images `data` to `out` (npz), and a note on their origin beside it (JSON).

    Returns the note on the first process, None on the others.
    """
    found = measurer.measure(data, split, keep=SAMPLE)
    if found is None:
        return None
    arrays = {"mu": found.mu, "sigma": found.sigma, "features": found.features.numpy()}
    with reading(out, "cannot be written"), atomic_write(out) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
    note = {"made_of": found.about.pop("path"), "split": split, **found.about}
    note |= {
        "features": len(found.features),
        "extractor": measurer.inception.about,
        "npz_sha256": sha256(out),
    }
    write_json(out.with_suffix(".json"), note)
    return note
