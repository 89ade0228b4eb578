"""What images are scored against: ADM's batches, mu and sigma, images, or statistics that we have made."""

import json
from pathlib import Path

import numpy as np
import torch

from evaluation.features import INCEPTION, Measured, Measurer, Space, crop_name
from util.data.npz import Npz
from util.errors import UserError, one_line, reading
from util.files import atomic_write, sha256, write_json

SAMPLE = 10_000  # images for KID, precision and recall, as in the paper's table
ADM = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/{0}"
    "/VIRTUAL_imagenet{0}_labeled.npz"
)


def where_from(size: int | None, space: Space = INCEPTION) -> str:
    """Says where to get a reference for images of `size` x `size` pixels; None: their size is not known."""
    flags = f" --img_size {size}" if size else ""
    sides = [side for side in (64, 256) if size in (side, None)]
    if space is not INCEPTION:
        flags, sides = f"{flags} --features {space.name}", []
    make = f"make one of your images: python -m evaluation.score DATA --make_reference FILE.npz{flags}"
    of_imagenet = [f"{ADM.format(side)} ({side} px)" for side in sides]
    return f"for ImageNet get {' or '.join(of_imagenet)}, or {make}" if of_imagenet else make


def open_npz(path: Path, size: int | None = None, space: Space = INCEPTION) -> Npz:
    """Opens a reference npz and checks its network and the names, dtypes and shapes of its arrays.

    `size` is that of the images, for the message. Raises UserError that says what is wrong with the file and
    where to get a good one.
    """
    advice = where_from(size, space)
    try:
        npz = Npz(path)
    except UserError as error:
        raise UserError(f"{error}, or {advice}") from error
    names = npz.arrays.keys()
    if not names & {"mu", "sigma", "features", "arr_0"}:
        listed = ", ".join(names)
        raise UserError(
            f"{path}: a reference has mu and sigma, or images as arr_0, but this has {listed}; {advice}"
        )
    if names & {"mu", "sigma", "features"}:
        # ADM's references, and ours from before there were other networks, are Inception's and do not say so.
        made_by = one_line(npz.array("network")) if "network" in names else INCEPTION.name
        if made_by != space.name:
            raise UserError(
                f"{path}: holds features of {made_by}, not of --features {space.name}; "
                f"give --features {made_by}, or {advice}"
            )
        shapes = {"mu": (space.dim,), "sigma": (space.dim, space.dim)}
        if "features" in names:
            shapes["features"] = (*npz.arrays["features"][1][:1], space.dim)
        for name, shape in shapes.items():
            dtype, found = npz.arrays.get(name, (None, None))
            if found != shape or dtype.kind != "f":
                raise UserError(
                    f"{path}: {name} is {npz.describe(name)}, it must be floats {shape}; {advice}"
                )
    return npz


def open_reference(path: Path, measurer: Measurer, split: str | None = None) -> Measured | None:
    """Reads a reference npz, or measures images and keeps the features of SAMPLE of them.

    path   an existing npz file, a folder of images, or, with `split`, a data set

    Returns None on all but the first process where images are measured. Raises UserError that says what is
    wrong with the file, or where to get a good one.
    """
    if path.is_dir():
        return measurer.measure(path, split, keep=SAMPLE)
    npz, digest, found = open_npz(path, measurer.size, measurer.space), sha256(path), None
    names = npz.arrays.keys()
    if names & {"mu", "sigma", "features"}:
        mu, sigma = read(npz, "mu", np.float64), read(npz, "sigma", np.float64)
        found = Measured(mu, sigma, None, None, {"path": str(path), "sha256": digest})
    if "features" in names:
        note = read_note(path, measurer, digest)
        found.about |= {"made": note, "pictures": note["pictures"]}
        found.features = torch.from_numpy(read(npz, "features", np.float32))
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


def read(npz: Npz, name: str, dtype: type) -> np.ndarray:
    """Reads an array of finite numbers as `dtype`: torch-fidelity wants one for both sides."""
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
    if weights != measurer.network.about["weights_sha256"]:
        raise UserError(
            f"{path}: was made with other weights of the network (sha256 {weights}); "
            "give those or make it again"
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
    arrays["network"] = measurer.space.name
    with reading(out, "cannot be written"), atomic_write(out) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
    note = {"made_of": found.about.pop("path"), "split": split, **found.about}
    note |= {
        "features": len(found.features),
        "extractor": measurer.network.about,
        "npz_sha256": sha256(out),
    }
    write_json(out.with_suffix(".json"), note)
    return note
