"""Files that are whole or not there."""

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
    """A temporary path beside `path` to write to; at the end it is renamed: `path` is the old file or the new one, never a
    part, also when the process is killed; and, if `durable`, on the disk before, for when the power fails."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            _to_disk(temporary)
        os.replace(temporary, path)
        if durable:
            with suppress(OSError):  # not every system can
                _to_disk(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content) -> None:
    """Raises UserError where it cannot be written."""
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """In hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sidecar(path: Path) -> Path:
    """The file beside `path` that says what its SHA-256 should be, as `sha256sum --check` reads it."""
    return path.with_name(f"{path.name}.sha256")


def write_sidecar(path: Path, digest: str) -> None:
    """To be called before `path` gets its name: where it is there already, its hash stays in a second line, true until then."""
    before = sidecar(path).read_text().partition("\n")[0] if path.exists() and sidecar(path).exists() else ""
    with atomic_write(sidecar(path)) as temporary:
        temporary.write_text(f"{digest}  {path.name}\n{before}")


def verify(path: Path, *others: Path) -> None:
    """Raises UserError where there are hashes, in the file's sidecar or in `others`, and none is the file's. A flipped bit
    loads without a word, from a pickle as from safetensors."""
    texts = [file.read_text(errors="replace") for file in (sidecar(path), *others) if file.exists()]
    if texts and sha256(path) not in " ".join(texts).split():
        raise UserError(f"{path}: damaged, its SHA-256 is not what {path.name}.sha256 or its like says")


def remove_stale(folder: Path) -> None:
    """Removes what `whole` left in `folder` where a process was killed."""
    for path in folder.glob("*.tmp"):
        if re.search(r"\.\d+\.tmp$", path.name):
            path.unlink(missing_ok=True)
