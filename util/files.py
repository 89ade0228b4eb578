"""Atomic writes, locks, and SHA-256 files that tell whether a file is damaged."""

import errno
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from util.errors import UserError, one_line


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
            to_disk(temporary)
        os.replace(temporary, path)
        if durable:
            with suppress(OSError):  # some systems cannot do this for a folder
                to_disk(path.parent)
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


def try_lock(path: Path, owner: dict) -> tuple[IO | None, dict]:
    """Tries to lock the file `path` for this process. Returns the open file, or None if another one has it.

    The second value is the `owner` that the process wrote which has the lock. It has the lock until it closes
    the file or ends, in whatever way: a POSIX record lock belongs to one process, and its children do not
    inherit it. The file stays behind and means nothing by itself. Two machines see each other's locks if the
    file system passes them on, as NFS and Lustre (mounted with "flock") do. Raises OSError where it has none.
    """
    import fcntl  # Windows does not have it

    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        with file:
            file.seek(0)
            with suppress(ValueError):
                found = json.loads(file.read())
                return None, found if isinstance(found, dict) else {}
            return None, {}
    except OSError:
        file.close()
        raise
    with suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(json.dumps(owner))
        file.flush()
        os.fsync(file.fileno())
    return file, owner


def check_writable(path: Path, what: str) -> None:
    """Raises UserError, which calls the file `what`, if it cannot be written; makes its folder if need be.

    Programs call this before the work whose result they shall write.
    """
    with writing(what):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        probe = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # the name that `atomic_write` uses
        probe.touch()
        probe.unlink()


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


def is_full(error: BaseException) -> bool:
    """Whether the disk, or the user's part of it, is full."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


class HashingFile:
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

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def check_archive(file: Path | IO[bytes]) -> None:
    """Raises UserError for a zip file that torch.save cannot have written, because it could fill the memory.

    torch.save compresses nothing, and its members lie one after the other from the beginning of the file. A
    compressed or overlapping member may be a thousand times as large as the file. Files of other formats
    pass.
    """
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    compressed = [member for member in members if member.compress_type != zipfile.ZIP_STORED]
    total = sum(member.file_size for member in members)
    if isinstance(file, Path):
        size = file.stat().st_size
    else:
        file.seek(0, os.SEEK_END)
        size = file.tell()
    begin = min((member.header_offset for member in members), default=0)
    if compressed or total > size or begin:
        name = f"a compressed member, {one_line(compressed[0].filename)}" if compressed else "odd members"
        raise UserError(f"refused, it has {name}, which torch.save never writes; save the weights again")


def to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_writable(output_dir: str) -> Path:
    """Makes the folder if needed. Raises UserError if nothing can be written to it."""
    folder = Path(output_dir)
    with writing(f"--output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    return folder
