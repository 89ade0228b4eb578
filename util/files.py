"""Atomic writes, and SHA-256 files that tell whether a file is damaged."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from util.errors import UserError


@contextmanager
def atomic_write(path: Path, durable: bool = True) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to, and renames it to `path` at the end.

    So `path` is always the complete old or the complete new file, even if the process is killed. With
    `durable` the new file is on the disk before it is renamed, so that this also holds if the power fails.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            _to_disk(temporary)
        os.replace(temporary, path)
        if durable:
            with suppress(OSError):  # some systems cannot do this for a folder
                _to_disk(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(file: object, advice: str = "") -> Iterator[None]:
    """Within this block, an OSError becomes a UserError "<file>: cannot be written (<reason>)<advice>"."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error}){advice}") from error


def remove_stale(folder: Path) -> None:
    """Removes the temporary files that `atomic_write` left in `folder` when a process was killed."""
    for path in folder.glob("*.tmp"):
        if re.search(r"\.\d+\.tmp$", path.name):
            path.unlink(missing_ok=True)


def write_json(path: Path, content) -> None:
    """Writes `content` as JSON, atomically. Raises UserError if the file cannot be written."""
    with writing(path), atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sidecar(path: Path) -> Path:
    """The file beside `path` that holds the SHA-256 of `path`, in the format of `sha256sum --check`."""
    return path.with_name(f"{path.name}.sha256")


def write_sidecar(path: Path, digest: str) -> None:
    """Writes the SHA-256 of a new file before the file itself is renamed to `path`.

    If there is an older file at `path`, its hash is kept in a second line, because it is valid until then.
    """
    before = ""
    if path.exists() and sidecar(path).exists():
        before = sidecar(path).read_text().partition("\n")[0]
    with atomic_write(sidecar(path)) as temporary:
        temporary.write_text(f"{digest}  {path.name}\n{before}")


def verify(path: Path, *others: Path) -> None:
    """Raises UserError if the file's sidecar or `others` hold hashes and none of them is that of the file.

    Without this, a flipped bit would be loaded silently, from a pickle as well as from a safetensors file.
    """
    texts = [file.read_text(errors="replace") for file in (sidecar(path), *others) if file.exists()]
    if texts and sha256(path) not in " ".join(texts).split():
        raise UserError(f"{path}: damaged, its SHA-256 is in none of the .sha256 files beside it")


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
