"""Checkpoints in the published format: a dict `model, optimizer, epoch, scaler, args`, and what resuming needs besides.

A folder holds the last few as checkpoint-<step>.pth, each with its SHA-256 beside it, and checkpoint-last.pth, a hard link
to the newest. At any moment, also in the middle of a write, it holds a whole one.

Loading cannot run code: `weights_only=True` with `argparse.Namespace` as the one class allowed (util/__init__.py) besides
tensors and plain values. (torch before 2.10 has holes there: CVE-2025-32434, CVE-2026-24747.)
"""

import hashlib
import os
import pickle
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from util.errors import UserError, one_line
from util.files import atomic_write, remove_stale, sha256, sidecar, verify, write_sidecar

NAME = "checkpoint-last.pth"
SAFETENSORS_NAME = "model.safetensors"  # as the Hugging Face hub names it
SAFETENSORS_SUFFIX = ".safetensors"
NUMBERED = f"checkpoint-{8 * '[0-9]'}.pth"


class _Hashing:
    """A file that is written to, with the SHA-256 of what it should hold."""

    def __init__(self, file):
        self.file, self.sha256, self.error = file, hashlib.sha256(), None

    def write(self, data) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error  # torch hides it behind one of its own
            raise

    def flush(self) -> None:
        self.file.flush()


def save(folder: Path, content: dict, keep_last: int = 2) -> Path:
    """Writes checkpoint-<content["step"]>.pth, points checkpoint-last.pth at it, and keeps the `keep_last` newest.

    Raises OSError where the disk does not take it; what was there is then as it was.
    """
    path = folder / f"checkpoint-{content['step']:08d}.pth"
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file:
            hashing = _Hashing(file)
            try:
                torch.save(content, hashing)
            except RuntimeError as error:
                raise hashing.error or error from None
        write_sidecar(path, hashing.sha256.hexdigest())
    for old in [other for other in _numbered(folder) if other != path][max(1, keep_last) - 1 :]:
        with suppress(OSError):
            old.unlink()
            sidecar(old).unlink(missing_ok=True)
    with atomic_write(folder / NAME) as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)
    return path


def clean(folder: Path) -> None:
    """Removes what a killed run left half-written."""
    remove_stale(folder)
    for path in folder.glob(f"{NUMBERED}.sha256"):
        if not path.with_suffix("").exists():
            path.unlink(missing_ok=True)


def locate(resume: str | Path) -> Path:
    """A checkpoint file, or the folder of one or of a `save_pretrained` -> the file's path (which may not exist)."""
    path = Path(resume)
    if not path.is_dir() and path.suffix:
        return path
    pretrained = path / SAFETENSORS_NAME
    return pretrained if pretrained.exists() and not (path / NAME).exists() else path / NAME


def candidates(path: Path) -> list[Path]:
    """`path`; where it is a folder's checkpoint-last.pth, the others there too, in the order in which to try them."""
    if path.name != NAME:
        return [path]
    others = _numbered(path.parent)
    if not path.exists():  # killed before the first one had its second name
        return others or [path]
    if any(other.samefile(path) for other in others):
        return [path, *(other for other in others if not other.samefile(path))]
    return sorted(
        [path, *others], key=lambda file: file.stat().st_mtime_ns, reverse=True
    )  # no links: it may be older


def exists(path: Path) -> bool:
    return any(candidate.exists() for candidate in candidates(path))


def load_newest(path: Path, say: Callable[[str], None]) -> tuple[Path, dict]:
    """The checkpoint and its file: the first of `candidates(path)` that is whole. Damaged ones are named by `say`."""
    first = None
    for candidate in candidates(path):
        try:
            return candidate, load(candidate)
        except UserError as error:
            first = first or error
            say(f"{error}; trying the one before")
    raise first


def _numbered(folder: Path) -> list[Path]:
    """Those that `save` has written, newest first."""
    ours = [path for path in folder.glob(NUMBERED) if sidecar(path).exists()]
    return sorted(ours, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def load(path: Path, *, mmap: bool = False) -> dict:
    """The checkpoint's dict, on the host. Raises UserError for a file that is missing, damaged, hostile or another.

    A safetensors file gives {"model": weights}. `mmap` leaves the tensors on disk until they are read.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give the file or the folder that holds {NAME}")
    verify(path, *(path.parent.glob(f"{NUMBERED}.sha256") if path.name == NAME else ()))
    if path.suffix == SAFETENSORS_SUFFIX:
        return {"model": load_safetensors(path)}
    try:
        content = torch.load(path, map_location=lambda storage, _: storage, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reason = next(
            (line for line in str(error).splitlines() if "nsupported" in line), "not a pickle of weights"
        )
        raise UserError(
            f"{path}: refused, it is damaged or holds more than weights ({one_line(reason.split('. Please')[0])})"
        ) from error
    except Exception as error:  # a hostile file decides what the reader stumbles over
        raise UserError(f"{path}: cannot be read, it is damaged or cut short ({one_line(error)})") from error
    content = dict(dict.items(content)) if isinstance(content, dict) else {}
    content["model"] = check_weights(content.get("model"), path)
    if content.get("model_ema") is not None:
        content["model_ema"] = check_weights(content["model_ema"], path, "model_ema")
    return content


def load_weights(model: nn.Module, weights: dict, path: Path) -> None:
    """Strict: raises UserError that says which names and shapes differ, before a single weight is changed."""
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in weights.items()}
    differences = [
        ("missing", [name for name in ours if name not in theirs]),
        ("unknown", [name for name in theirs if name not in ours]),
        ("of another shape", [
            f"{name} {theirs[name]} instead of {shape}" for name, shape in ours.items() if theirs.get(name, shape) != shape
        ]),
    ]  # fmt: skip
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in differences
        if names
    ]
    if parts:
        raise UserError(f"{path}: weights of another model: {'; '.join(parts)}")
    model.load_state_dict(weights, strict=True)


def random_state(device: torch.device) -> dict:
    """The state of every generator of this process, made of tensors and plain values only."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if hasattr(module := torch.get_device_module(device), "get_rng_state"):
        state["device"] = module.get_rng_state(device)
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    module = torch.get_device_module(device)
    if "device" in state and hasattr(module, "set_rng_state"):
        module.set_rng_state(state["device"], device)


def save_safetensors(path: Path, weights: dict[str, Tensor]) -> None:
    """Writes a safetensors file, whole or not at all, and its SHA-256 beside it."""
    with atomic_write(path) as temporary:
        temporary.touch()
        mode = (
            temporary.stat().st_mode
        )  # as the umask says; save_file renames a file that only its owner may read
        save_file(
            {name: value.contiguous() for name, value in weights.items()},
            temporary,
            metadata={"format": "pt"},
        )
        temporary.chmod(mode)
        write_sidecar(path, sha256(temporary))


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the host. Raises UserError for one that is missing, damaged or another."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    verify(path)
    try:
        weights = load_file(path)
    except Exception as error:  # safetensors' own class and whatever else a hostile header makes it raise
        raise UserError(
            f"{path}: cannot be read, it is damaged or no safetensors file ({one_line(error)})"
        ) from error
    return check_weights(weights, path)


def check_weights(weights, path: Path, key: str = "model") -> dict[str, Tensor]:
    """`weights`, which a file called its `key`, as a new dict of names and ordinary tensors, or UserError.

    A pickle may hold an OrderedDict whose methods its own attributes hide, tensors without data (meta), sparse
    ones, names that are no text or that move the cursor: nothing of that goes further than this.
    """
    items = dict.items(weights) if isinstance(weights, dict) else [(None, None)]
    if not all(isinstance(name, str) and name.isprintable() and _is_ordinary(value) for name, value in items):
        raise UserError(f"{path}: not a checkpoint, it has no dict {key!r} of tensors")
    return dict(items)


def fingerprint(weights: dict[str, Tensor]) -> str:
    """SHA-256, in hex, of names, types, shapes and values: the same wherever and however they are kept."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _is_ordinary(value) -> bool:
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
    )
