"""Weights as safetensors, and the check that what a file called weights is nothing else."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from util.errors import UserError, one_line
from util.files import atomic_write, sha256, verify, write_sidecar

NAME = "model.safetensors"  # as the Hugging Face hub names it
SUFFIX = ".safetensors"


def save(path: Path, weights: dict[str, Tensor]) -> None:
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


def load(path: Path) -> dict[str, Tensor]:
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
    return plain(weights, path)


def plain(weights, path: Path, key: str = "model") -> dict[str, Tensor]:
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
