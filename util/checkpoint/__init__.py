"""Saves and loads checkpoints in the published format, and weights as safetensors files.

A checkpoint is a dict with the published keys `model, optimizer, epoch, scaler, args` and what resuming needs
besides. A folder holds the newest few as checkpoint-<step>.pth, each with its SHA-256 in a file beside it,
and checkpoint-last.pth, a hard link to the newest. It holds a complete one at any moment, even during a
write. The newest is the one of the highest step, whatever the clocks of the machines say. A checkpoint is
known to be healthy once the loss that was computed from it is normal; checkpoint-healthy.txt names the newest
of these, and it is never removed. checkpoint-best.pth holds the weights alone of the best validation score.
A sharded run keeps the tensors of a checkpoint in a folder beside it, see util/checkpoint/parts.py.

Loading cannot run code of the file: `weights_only=True` admits tensors, plain values and one class,
`argparse.Namespace` (util/__init__.py). (torch before 2.10 has holes there: CVE-2025-32434, CVE-2026-24747.)
"""

import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from util.checkpoint.weights import DTYPES, check_weights, load_safetensors, save_safetensors  # noqa: F401
from util.errors import UserError, one_line, reading
from util.files import HashingFile, atomic_write, check_archive, is_full, sidecar, verify, write_sidecar

NAME, BEST = "checkpoint-last.pth", "checkpoint-best.pth"
SAFETENSORS_NAME = "model.safetensors"  # the name on the Hugging Face hub
NUMBERED = f"checkpoint-{8 * '[0-9]'}.pth"
HEALTHY = "checkpoint-healthy.txt"


def numbered(folder: Path, step: int) -> Path:
    """The file of the checkpoint of a step."""
    return folder / f"checkpoint-{step:08d}.pth"


def list_numbered(folder: Path) -> list[Path]:
    """The files that `save` wrote, that of the highest step first."""
    return sorted((path for path in folder.glob(NUMBERED) if sidecar(path).exists()), reverse=True)


def save(folder: Path, content: dict, keep_last: int = 2, healthy: Path | None = None) -> None:
    """Writes the checkpoint of the step content["step"], and lets checkpoint-last.pth be a link to it.

    Of the older ones of its folder it keeps `healthy`, the newest that is known to be so, and as many as make
    `keep_last` with the new one. Those of later steps are removed: the run went back to before them. On a
    full disk the older ones make room, the oldest first, but never `healthy` or, if that is None, the newest.
    Raises OSError if the disk refuses the file all the same.
    """
    path = numbered(folder, content["step"])
    while True:
        try:
            _write(path, content, healthy)
            break
        except OSError as error:
            if not is_full(error) or not make_room(folder, healthy):
                raise
    files = list_numbered(folder)
    older = [file for file in files if file.name < path.name]
    try:
        make_last(path)  # before what it was goes
    finally:
        for file in {*files} - {path, healthy, *older[: max(1, keep_last) - 1]}:
            remove(file)


def save_best(folder: Path, content: dict) -> None:
    """Writes checkpoint-best.pth in the place of the one before. Raises OSError if the disk refuses it."""
    _write(folder / BEST, content, None)


def _write(path: Path, content: dict, healthy: Path | None) -> None:
    if healthy is not None and healthy != find_healthy(path.parent):
        with atomic_write(path.with_name(HEALTHY)) as temporary:
            temporary.write_text(f"{healthy.name}\n")
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as opened:
            file = HashingFile(opened)
            try:
                torch.save(content, file)
            except RuntimeError as error:
                raise file.error or error from None
        write_sidecar(path, file.sha256.hexdigest())


def make_room(folder: Path, healthy: Path | None) -> bool:
    """Removes the oldest checkpoint but `healthy` or, if that is None, the newest. False: there is none."""
    files = list_numbered(folder)
    kept = healthy if healthy in files else next(iter(files), None)
    *_, oldest = [None, *(file for file in files if file != kept)]
    if oldest is None:
        return False
    if oldest == files[0]:  # checkpoint-last.pth is a link to it
        make_last(kept)
    remove(oldest)
    return not oldest.exists()


def remove(file: Path) -> None:
    """Removes a checkpoint: first the file, without which the others are none."""
    with suppress(OSError):
        file.unlink(missing_ok=True)
        sidecar(file).unlink(missing_ok=True)
        shutil.rmtree(shards_of(file), ignore_errors=True)


def shards_of(file: Path) -> Path:
    """The folder of the tensors of a checkpoint in parts."""
    return file.with_suffix(".shards")


def size(file: Path) -> int:
    """The bytes of a checkpoint."""
    return sum(part.stat().st_size for part in (file, *shards_of(file).glob("*")))


def make_way(path: Path, size: int, healthy: Path | None) -> None:
    """Prepares to write a checkpoint of `size` bytes beside the others (see `save`)."""
    remove(path)
    with suppress(OSError):  # of which writing will tell all processes
        while shutil.disk_usage(path.parent).free < size and make_room(path.parent, healthy):
            pass


def clean_up(path: Path, error: BaseException, healthy: Path | None) -> bool:
    """Removes a checkpoint in parts that could not be written because of `error`, if it is not whole.

    Where the disk was full, an old one makes room. Returns whether one did.
    """
    if not path.exists():
        remove(path)
    return is_full(error) and make_room(path.parent, healthy)


def failure(path: Path, error: BaseException) -> str:
    """Says that a checkpoint could not be written because of `error`, and what is left."""
    others = list_numbered(path.parent)
    left = f"{others[0].name} is whole" if others else "there is no other"
    reason, step = getattr(error, "strerror", None) or one_line(error), int(path.stem.split("-")[1])
    return f"{path.parent}: the checkpoint of step {step} could not be written ({reason}); {left}"


def make_last(path: Path) -> None:
    """Lets checkpoint-last.pth be a link to `path`, so that the run continues from there."""
    with atomic_write(path.with_name(NAME)) as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)


def find_healthy(folder: Path) -> Path | None:
    """The newest checkpoint of the folder that is known to be healthy, if there is one."""
    with suppress(OSError, UnicodeDecodeError):
        path = folder / (folder / HEALTHY).read_text().strip()
        if path in list_numbered(folder):
            return path


def locate(resume: str | Path) -> Path:
    """Finds the checkpoint file, which may not exist, of a file, a run, or what save_pretrained wrote."""
    path = Path(resume)
    if not path.is_dir() and path.suffix:
        return path
    pretrained = path / SAFETENSORS_NAME
    return pretrained if pretrained.exists() and not (path / NAME).exists() else path / NAME


def load(path: Path, *, mmap: bool = False, like: Callable | None = None, optimizer: bool = True) -> dict:
    """Loads a checkpoint to the host. Raises UserError if it is missing, damaged, hostile or no checkpoint.

    A safetensors file gives {"model": weights}. With `mmap` the tensors of a single file stay on disk until
    used; of a checkpoint in parts, those of the optimiser are left out without `optimizer`. `like` is for a
    sharded model, see `parts.fill`.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give the file or the folder that holds {NAME}")
    if path.suffix == ".safetensors":
        return {"model": load_safetensors(path)}
    verify(path, *(path.parent.glob(f"{NUMBERED}.sha256") if path.name == NAME else ()))
    with reading(path, "cannot be read, it is damaged or cut short"):
        check_archive(path)
        try:
            content = torch.load(path, map_location=lambda storage, _: storage, weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            lines = (line for line in str(error).splitlines() if "nsupported" in line)
            reason = one_line(next(lines, "not a pickle of weights").split(". Please")[0])
            raise UserError(f"refused, it is damaged or holds more than weights ({reason})") from error
    content = dict(dict.items(content)) if isinstance(content, dict) else {}
    in_parts = bool(content.get("shards"))
    for key in ("model", "model_ema"):
        if key == "model" or content.get(key) is not None:
            content[key] = check_weights(content.get(key), path, key, in_parts)
    if in_parts or like is not None:
        from util.checkpoint.parts import fill  # whose imports take a second

        with reading(path, "is no checkpoint"):
            folder = shards_of(numbered(path.parent, int(content.get("step", 0))))
        content = fill(content, folder, like, optimizer)
    return content


def load_model(model: nn.Module, resume: str | Path, ema: bool | None) -> tuple[Path, bool]:
    """Loads the weights of a checkpoint, or with `ema` their average; None: that, where there is one.

    Returns the file, and whether it was the average.
    """
    path = locate(resume)
    content = load(path, optimizer=False)
    average = content.get("model_ema")
    if ema and not average:
        raise UserError(f"{path}: holds no averaged weights 'model_ema'; leave out --ema")
    weights = content["model"] if ema is False else average or content["model"]
    load_weights(model, weights, path)
    return path, weights is average


def load_weights(model: nn.Module, weights: dict, path: Path) -> None:
    """Copies `weights` into `model`; all names and shapes must agree, and all weights be of `DTYPES`.

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
    for name, value in weights.items():
        if value.dtype not in DTYPES:  # copying a complex number would drop a half of it
            raise UserError(
                f"{path}: weight {name} is {value.dtype}; weights are floats of 16, 32 or 64 bits"
            )
    model.load_state_dict(weights, strict=True)
