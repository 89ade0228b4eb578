"""Reads the images of a pack that is cut into shards, from a folder or from an address of fsspec.

Image i is row i % n of shard i // n, so there is no table of images. pack.sha256 has the hashes of shards. In
a folder it is checked once on a machine; a mark in the cache says so until size or time change. From an
address it is checked when the shard has come, which then lies in the cache under its hash.
"""

import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
from filelock import FileLock

from util.errors import UserError, one_line, reading, warn_once
from util.files import atomic_write, check_writable, is_full, sha256

PAUSES = (1, 2, 4, 8, 16, 32)  # seconds between attempts to fetch a file
MINUTE = 60  # in which other processes do not try what has failed
LOST = 600  # seconds until a lost shard is tried again
MAX_OPEN = 128  # files of a process


def location(root: Path | str) -> Path | str:
    """A folder as a Path, and an address such as s3://bucket/pack as a text without a slash at its end."""
    if isinstance(root, Path) or "://" not in root:
        return Path(root)
    if re.search(r"//[^@]*:[^@]*@|^https?://[^/]*@|\?", root):  # it would stand in logs and checkpoints
        raise UserError("an address of data must hold no password and no '?'; give keys by the environment")
    return root.rstrip("/")


class Full(UserError):
    """There is no room in the cache, so no image of any shard can be read: the run must end."""


class PackFiles:
    """The files of a pack in `place`, a folder or an address. `hashes` are their SHA-256 by name.

    The cache is the folder FRACTALGEN_CACHE. It holds FRACTALGEN_CACHE_GB and what is being fetched. Shards
    that were fetched first make room for others; a process that is reading one has it open and goes on.
    """

    def __init__(self, place: Path | str):
        self.place, self.is_remote, self.pauses = place, isinstance(place, str), PAUSES
        self.hashes: dict[str, str] = {}

    @cached_property
    def cache(self) -> tuple[Path, float]:
        """The folder of the cache, and the bytes that it may hold."""
        folder = Path(os.environ.get("FRACTALGEN_CACHE", "~/.cache/fractalgen")).expanduser()
        check_writable(folder / "new", f"FRACTALGEN_CACHE {folder}")
        with reading("FRACTALGEN_CACHE_GB", "must be a number"):
            limit = float(os.environ.get("FRACTALGEN_CACHE_GB", 50)) * 1e9
        if not limit >= 0:
            raise UserError("FRACTALGEN_CACHE_GB: must be a number from 0 on")
        return folder, limit

    def text(self, name: str) -> str:
        with reading(name, "cannot be read"):
            if self.is_remote:
                return self.attempt(name, lambda fs, path: fs.cat_file(path)).decode()
            return (self.place / name).read_text(encoding="utf-8")

    def open(self, name: str, size: int) -> int:
        """A descriptor of a file of about `size` bytes whose hash is right. Raises UserError or OSError."""
        if name not in self.hashes:
            raise UserError("has no line in pack.sha256")
        return self.open_fetched(name, size) if self.is_remote else self.open_checked(name)

    def open_checked(self, name: str) -> int:
        path, digest = self.place.resolve() / name, self.hashes[name]
        about = path.stat()
        version = f"{path} {about.st_ino} {about.st_size} {about.st_mtime_ns} {digest}"
        mark = self.cache[0] / f"{hashlib.sha256(version.encode()).hexdigest()}.checked"
        if not mark.exists():
            with FileLock(mark.with_suffix(".lock")):  # one process reads the shard, the others wait
                if not mark.exists():
                    check_hash(path, digest)
                    mark.touch()
        return os.open(path, os.O_RDONLY)

    def open_fetched(self, name: str, size: int) -> int:
        folder, limit = self.cache
        with suppress(FileNotFoundError):
            return os.open(f"{folder}/{self.hashes[name]}", os.O_RDONLY)
        path = folder / self.hashes[name]
        failed = path.with_suffix(".failed")
        with FileLock(path.with_suffix(".lock")):
            with suppress(FileNotFoundError):  # another process has fetched it in the meantime
                return os.open(path, os.O_RDONLY)
            with suppress(FileNotFoundError):  # or could not: all others that waited do not try it again
                if time.time() - failed.stat().st_mtime < MINUTE:
                    raise UserError(failed.read_text(encoding="utf-8"))
            warn_once(f"fetching {self.place}/{name} ({size / 1e6:,.0f} MB)")
            free = shutil.disk_usage(folder).free
            make_room(folder, limit - size, size - free, killed=folder.glob(f"{path.name}.*.tmp"))
            with atomic_write(path) as part:

                def fetch(fs, source: str) -> None:
                    fs.get_file(source, str(part))
                    check_hash(part, path.name)

                try:
                    self.attempt(name, fetch)
                except UserError as error:
                    warn_once(f"{self.place}/{name}: {error}")
                    with suppress(OSError):
                        failed.write_text(str(error), encoding="utf-8")
                    raise
                failed.unlink(missing_ok=True)
                return os.open(part, os.O_RDONLY)

    def attempt(self, name: str, action: Callable):
        """The result of action(file system, path). Raises UserError when it has failed after all PAUSES.

        From then on each file gets two attempts, until one succeeds: a lost network is reported soon.
        """
        for pause in (*self.pauses, None):
            try:
                from fsspec.core import url_to_fs

                found = url_to_fs(f"{self.place}/{name}")  # anew: worker processes share no sockets
            except (ImportError, ValueError) as error:
                reason = error
                break
            try:
                result = action(*found)
                self.pauses = PAUSES
                return result
            except (FileNotFoundError, PermissionError) as error:
                reason = "no such file" if isinstance(error, FileNotFoundError) else error
                break
            except Exception as error:  # each file system has errors of its own
                if is_full(error):
                    raise Full(f"FRACTALGEN_CACHE {self.cache[0]}: {error.strerror}") from None
                reason = error
                if pause is None:
                    self.pauses = PAUSES[:1]
                else:
                    time.sleep(pause)
        # A library may name a signed address, also in the error that would be the cause.
        reason = re.sub(r"(?<=//)[^/\s]*:[^/\s]*@|\?\S*", "", str(reason))
        raise UserError(f"cannot be fetched ({one_line(reason)})") from None


def check_hash(path: Path, digest: str) -> None:
    if sha256(path) != digest:
        raise OSError(f"damaged: the SHA-256 of its {path.stat().st_size:,} bytes is not that in pack.sha256")


def make_room(folder: Path, limit: float, missing: float, killed: Iterable[Path]) -> None:
    """Removes killed downloads, and shards until those in `folder` take no more than `limit` bytes.

    So many bytes as are `missing` on the disk are removed at least.
    """
    with suppress(FileNotFoundError):  # another process does the same
        for part in killed:
            part.unlink()
        held = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in folder.glob("?" * 64))
        excess = max(missing, sum(size for _, size, _ in held) - limit)
        for _, size, path in held:
            if excess > 0:
                path.unlink()
                excess -= size


class Shards:
    """The rows of `count` images in shards of `length`; `row` is an empty one, (C, *shape).

    They are read from open files and not through a memory map, which would end the process where a file has
    become shorter or a disk fails. `name` makes a shard's file name of its number.
    """

    def __init__(
        self, files: PackFiles, name: Callable[[int], str], count: int, length: int, row: np.ndarray
    ):  # fmt: skip
        self.files, self.name, self.count, self.length, self.row = files, name, count, length, row
        self.opened: dict[int, tuple[int, int]] = {}  # descriptors of shards, and where rows begin
        self.lost: dict[int, tuple[float, str]] = {}  # when a shard was lost, and why

    def __getitem__(self, index: int) -> np.ndarray:
        """Raises UserError with the range of `images` that are lost if their shard cannot be read."""
        shard, number = divmod(index, self.length)
        when, why = self.lost.get(shard, (-math.inf, ""))
        if time.monotonic() - when < LOST:
            raise self.error(shard, why)
        values = np.empty(self.row.shape, self.row.dtype)
        try:
            file, start = self.opened.get(shard) or self.open(shard)
            try:
                count = os.preadv(file, [values], start + number * values.nbytes)
            finally:
                if self.files.is_remote:  # an open file would keep its space when it has made room
                    self.close(shard)
            if count < values.nbytes:
                raise OSError("too short")
            return values
        except Full:
            raise
        except (UserError, OSError) as error:
            self.close(shard)  # it is opened anew when it is tried again
            if isinstance(error, OSError):
                error = f"cannot be read ({one_line(error.strerror or error)})"
            self.lost[shard] = time.monotonic(), str(error)
            raise self.error(shard, str(error)) from None

    def error(self, shard: int, why: str) -> UserError:
        """Says that a shard cannot be read; `images` are its range. A new one: it holds what it passes."""
        images = range(shard * self.length, min((shard + 1) * self.length, self.count))
        what = f"{self.files.place}/{self.name(shard)}: {why}"
        error = UserError(f"{what}; with it images {images[0]} to {images[-1]}")
        error.images = images
        return error

    def open(self, shard: int) -> tuple[int, int]:
        size = min(self.length, self.count - shard * self.length) * self.row.nbytes
        file = self.files.open(self.name(shard), size)
        if len(self.opened) == MAX_OPEN:
            self.close(next(iter(self.opened)))
        self.opened[shard] = file, os.fstat(file).st_size - size  # the npy file's header is before the rows
        return self.opened[shard]

    def close(self, shard: int) -> None:
        if shard in self.opened:
            os.close(self.opened.pop(shard)[0])
