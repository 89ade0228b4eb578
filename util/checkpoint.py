"""Checkpoints in the published format: a dict `model, optimizer, epoch, scaler, args`, and what resuming needs besides.

Loading cannot run code: `weights_only=True` with `argparse.Namespace` as the one class allowed (util/__init__.py) besides
tensors and plain values. (torch before 2.10 has holes there: CVE-2025-32434, CVE-2026-24747.)
"""

import os
import pickle
import random
from pathlib import Path

import numpy as np
import torch
from torch import nn

from util import weights
from util.errors import UserError, one_line

NAME = "checkpoint-last.pth"


def save(path: Path, content: dict) -> None:
    """Writes to a temporary file beside `path` and renames: `path` is the old file or the new one, never a part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def locate(resume: str | Path) -> Path:
    """A checkpoint file, or the folder of one or of a `save_pretrained` -> the file's path (which may not exist)."""
    path = Path(resume)
    if not path.is_dir() and path.suffix:
        return path
    pretrained = path / weights.NAME
    return pretrained if pretrained.exists() and not (path / NAME).exists() else path / NAME


def load(path: Path, *, mmap: bool = False) -> dict:
    """The checkpoint's dict, on the host. Raises UserError for a file that is missing, damaged, hostile or another.

    A safetensors file gives {"model": weights}. `mmap` leaves the tensors on disk until they are read.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give the file or the folder that holds {NAME}")
    if path.suffix == weights.SUFFIX:
        return {"model": weights.load(path)}
    try:
        content = torch.load(path, map_location=lambda storage, _: storage, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "nsupported" in line), "not a pickle of weights")
        raise UserError(
            f"{path}: refused, it is damaged or holds more than weights ({one_line(reason.split('. Please')[0])})"
        ) from error
    except Exception as error:  # a hostile file decides what the reader stumbles over
        raise UserError(f"{path}: cannot be read, it is damaged or cut short ({one_line(error)})") from error
    content = dict(dict.items(content)) if isinstance(content, dict) else {}
    content["model"] = weights.plain(content.get("model"), path)
    if content.get("model_ema") is not None:
        content["model_ema"] = weights.plain(content["model_ema"], path, "model_ema")
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
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" for what, names in differences if names
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
