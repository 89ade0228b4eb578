"""Saves and loads checkpoints in the published format, and weights as safetensors files.

A checkpoint is a dict with the published keys `model, optimizer, epoch, scaler, args` and what resuming needs
besides. A folder holds the newest few as checkpoint-<step>.pth, each with its SHA-256 in a file beside it,
and checkpoint-last.pth, a hard link to the newest. It holds a complete one at any moment, even during a
write.

Loading cannot run code of the file: `weights_only=True` admits tensors, plain values and one class,
`argparse.Namespace` (util/__init__.py). (torch before 2.10 has holes there: CVE-2025-32434, CVE-2026-24747.)
"""

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from util.errors import UserError, one_line, reading
from util.files import atomic_write, remove_stale, sha256, sidecar, verify, write_sidecar

NAME = "checkpoint-last.pth"
SAFETENSORS_NAME = "model.safetensors"  # the name on the Hugging Face hub
NUMBERED = f"checkpoint-{8 * '[0-9]'}.pth"


class _HashingFile:
    """A file to write to. It computes the SHA-256 of what is written and keeps the system's error."""

    def __init__(self, file):
        self.file, self.sha256, self.error = file, hashlib.sha256(), None

    def write(self, data) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error  # torch raises an error of its own instead
            raise

    def flush(self) -> None:
        self.file.flush()


def save(folder: Path, content: dict, keep_last: int = 2) -> None:
    """Writes a checkpoint and keeps the `keep_last` newest of its folder.

    The file is checkpoint-<content["step"]>.pth, and checkpoint-last.pth becomes a link to it. Raises OSError
    if the disk refuses it; the older checkpoints are then unchanged.
    """
    path = folder / f"checkpoint-{content['step']:08d}.pth"
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as opened:
            file = _HashingFile(opened)
            try:
                torch.save(content, file)
            except RuntimeError as error:
                raise file.error or error from None
        write_sidecar(path, file.sha256.hexdigest())
    for old in [other for other in _numbered(folder) if other != path][max(1, keep_last) - 1 :]:
        with suppress(OSError):
            old.unlink()
            sidecar(old).unlink(missing_ok=True)
    with atomic_write(folder / NAME) as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)


def clean(folder: Path) -> None:
    """Removes the unfinished files of a run that was killed."""
    remove_stale(folder)
    for path in folder.glob(f"{NUMBERED}.sha256"):
        if not path.with_suffix("").exists():
            path.unlink(missing_ok=True)


def locate(resume: str | Path) -> Path:
    """Finds the checkpoint file (which may not exist) of a file's path, or of a folder that holds one.

    The folder may also be one that `save_pretrained` wrote.
    """
    path = Path(resume)
    if not path.is_dir() and path.suffix:
        return path
    pretrained = path / SAFETENSORS_NAME
    return pretrained if pretrained.exists() and not (path / NAME).exists() else path / NAME


def candidates(path: Path) -> list[Path]:
    """The files to try, in order: `path` and, if it is a checkpoint-last.pth, the older ones beside it.

    Empty if there is none, as at the beginning of a run.
    """
    if path.name != NAME:
        return [path] if path.exists() else []
    numbered = _numbered(path.parent)
    if not path.exists():  # the run was killed before it linked its first checkpoint
        return numbered
    files = [path, *(file for file in numbered if not file.samefile(path))]
    if len(files) > len(numbered):  # a file system without links: the copy may be older than the others
        files.sort(key=lambda file: file.stat().st_mtime_ns, reverse=True)
    return files


def load_newest(path: Path, say: Callable[[str], None]) -> tuple[Path, dict]:
    """Loads the first undamaged file of `candidates(path)`. Returns its path and its content.

    `say` is called with a line on each damaged file. Raises UserError if all are damaged.
    """
    first = None
    for candidate in candidates(path) or [path]:
        try:
            return candidate, load(candidate)
        except UserError as error:
            first = first or error
            say(f"{error}; trying the one before")
    raise first


def _numbered(folder: Path) -> list[Path]:
    """The files that `save` wrote, newest first."""
    ours = [path for path in folder.glob(NUMBERED) if sidecar(path).exists()]
    return sorted(ours, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def load(path: Path, *, mmap: bool = False) -> dict:
    """Loads a checkpoint to the host. Raises UserError if it is missing, damaged, hostile or no checkpoint.

    A safetensors file gives {"model": weights}. With `mmap` the tensors of a checkpoint stay on disk until
    used.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give the file or the folder that holds {NAME}")
    if path.suffix == ".safetensors":
        return {"model": load_safetensors(path)}
    verify(path, *(path.parent.glob(f"{NUMBERED}.sha256") if path.name == NAME else ()))
    with reading(path, "cannot be read, it is damaged or cut short"):
        try:
            content = torch.load(path, map_location=lambda storage, _: storage, weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            lines = (line for line in str(error).splitlines() if "nsupported" in line)
            reason = one_line(next(lines, "not a pickle of weights").split(". Please")[0])
            raise UserError(f"refused, it is damaged or holds more than weights ({reason})") from error
    content = dict(dict.items(content)) if isinstance(content, dict) else {}
    for key in ("model", "model_ema"):
        if key == "model" or content.get(key) is not None:
            content[key] = check_weights(content.get(key), path, key)
    return content


def load_model(model: nn.Module, resume: str | Path, ema: bool) -> Path:
    """Loads the weights, or with `ema` their average, of a checkpoint. Returns the file."""
    path = locate(resume)
    content = load(path)
    if ema and not content.get("model_ema"):
        raise UserError(f"{path}: holds no averaged weights 'model_ema'; leave out --ema")
    load_weights(model, content["model_ema" if ema else "model"], path)
    return path


def load_weights(model: nn.Module, weights: dict, path: Path) -> None:
    """Copies `weights` into `model`; all names and shapes must agree.

    Otherwise raises UserError that lists the differences, and changes no weight. `path` is for the message.
    """
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in weights.items()}
    differences = {
        "missing": [name for name in ours if name not in theirs],
        "unknown": [name for name in theirs if name not in ours],
        "of another shape": [
            f"{name} {theirs[name]} instead of {shape}"
            for name, shape in ours.items()
            if theirs.get(name, shape) != shape
        ],
    }
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in differences.items()
        if names
    ]
    if parts:
        raise UserError(f"{path}: weights of another model: {'; '.join(parts)}")
    model.load_state_dict(weights, strict=True)


def save_safetensors(path: Path, weights: dict[str, Tensor]) -> None:
    """Writes a safetensors file, atomically, and its SHA-256 in a file beside it."""
    with atomic_write(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # save_file ignores the umask: only the owner could read its file
        tensors = {name: value.contiguous() for name, value in weights.items()}
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)
        write_sidecar(path, sha256(temporary))


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Loads the tensors of a safetensors file to the host. Raises UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    verify(path)
    with reading(path, "cannot be read, it is damaged or no safetensors file"):
        weights = load_file(path)
    return check_weights(weights, path)


def check_weights(weights, path: Path, key: str = "model") -> dict[str, Tensor]:
    """Checks the entry `key` of a loaded file. Returns a new dict from printable names to ordinary tensors.

    Raises UserError for anything else: a pickle may hold an OrderedDict whose attributes hide its methods,
    tensors without data (meta), sparse tensors, and names that are not text or that contain control
    characters.
    """
    items = dict.items(weights) if isinstance(weights, dict) else [(None, None)]
    for name, value in items:
        plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
        on_host = plain and value.device.type == "cpu" and not value.is_nested
        if not (on_host and isinstance(name, str) and name.isprintable()):
            raise UserError(f"{path}: not a checkpoint, it has no dict {key!r} of tensors")
    return dict(items)


def fingerprint(weights: dict[str, Tensor]) -> str:
    """The SHA-256, in hexadecimal, of names, dtypes, shapes and values, independent of file and device."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
