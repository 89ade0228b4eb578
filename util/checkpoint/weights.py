"""Files of weights alone: safetensors, and the check of what a file holds as weights."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from util.errors import UserError, reading
from util.files import atomic_write, sha256, verify, write_sidecar

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of weights


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


def check_weights(weights, path: Path, key: str = "model", in_parts: bool = False) -> dict[str, Tensor]:
    """Checks the entry `key` of a loaded file. Returns a new dict from printable names to ordinary tensors.

    Where the checkpoint is `in_parts`, paths of tensors may take their place.

    Raises UserError for anything else: a pickle may hold an OrderedDict whose attributes hide its methods,
    tensors without data (meta), sparse tensors, and names that are not text or that contain control
    characters.
    """
    items = dict.items(weights) if isinstance(weights, dict) else [(None, None)]
    for name, value in items:
        plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
        on_host = plain and value.device.type == "cpu" and not value.is_nested
        elsewhere = in_parts and isinstance(value, str) and value == f"{key}/{name}"
        if not ((on_host or elsewhere) and isinstance(name, str) and name.isprintable()):
            raise UserError(f"{path}: not a checkpoint, it has no dict {key!r} of tensors")
    return dict(items)
