"""Checkpoints in parts, by torch.distributed.checkpoint (DCP): the tensors are in a folder beside the file.

Such a checkpoint is checkpoint-<step>.pth, as a single process writes it, but with the path of each tensor in
its place, and the folder checkpoint-<step>.shards. The file is written last, with the SHA-256 of those in the
folder and with the list of all tensors. Any number of processes can read them.

Reading runs no code of the files. DCP's own list, `.metadata`, is a pickle and is not read; ours consists of
plain values. DCP reads the tensors themselves safely.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)  # fmt: skip
from torch.distributed.checkpoint.utils import _ReaderView
from torch.distributed.tensor import DTensor, distribute_tensor

from util.errors import UserError, one_line, reading
from util.files import HashingFile, check_archive, sha256, to_disk

TREES = ("model", "model_ema", "optimizer")  # the entries of a checkpoint whose tensors are in the folder
HASHED_TOGETHER = 8  # files


def walk(tree: dict, change: Callable[[str, object], object], path: str = "") -> dict:
    """A copy of nested dicts, with change(path, value) in place of each value."""
    step = lambda key, x: walk(x, change, f"{key}/") if isinstance(x, dict) else change(key, x)  # noqa: E731
    return {key: step(f"{path}{key}", value) for key, value in tree.items()}


class _HashingFiles(FileSystem):
    """Files whose SHA-256 is known by path when they have been written, and whose errors are the system's."""

    def __init__(self):
        self.hashes: dict[Path, str] = {}

    @contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[HashingFile]:
        with open(path, mode) as opened:
            file = HashingFile(opened)
            try:
                yield file
            except RuntimeError as error:
                raise file.error or error from None
        self.hashes[path] = file.sha256.hexdigest()


class Writer(FileSystemWriter):
    """At the end the first process calls `commit` with the hashes of the files, and the list of tensors.

    The list has for each path a shape, a dtype and the parts: where each begins in the tensor, its shape, its
    file, and where in this file it is.
    """

    def __init__(self, folder: Path, commit: Callable[[dict], None]):
        super().__init__(folder, per_thread_copy_ahead=0)
        self.commit, self.fs = commit, _HashingFiles()

    def storage_meta(self) -> None:
        """Leaves out where the folder is, so that it can be moved."""

    def write_data(self, plan, planner):
        written = super().write_data(plan, planner)
        for place in (result.storage_data for result in written.value()):
            place.sha256 = self.fs.hashes[self.path / place.relative_path]  # is sent to the first process
        return written

    def finish(self, metadata: Metadata, results) -> None:
        super().finish(metadata, results)
        with suppress(OSError):  # some systems cannot do this for a folder
            to_disk(self.path)
        places, tensors = metadata.storage_data, {}
        for path, found in metadata.state_dict_metadata.items():
            chunks = ((part, places[MetadataIndex(path, part.offsets)]) for part in found.chunks)
            parts = [
                (tuple(part.offsets), tuple(part.sizes), place.relative_path, place.offset, place.length)
                for part, place in chunks
            ]
            tensors[path] = tuple(found.size), found.properties.dtype, parts
        files = {place.relative_path: place.sha256 for place in places.values()}
        self.commit({"files": dict(sorted(files.items())), "tensors": tensors})


class _View(_ReaderView):
    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """As of any file; torch's own seeks from the end in the wrong direction."""
        return super().seek(self.len + offset) if whence == os.SEEK_END else super().seek(offset, whence)


class _Reader(FileSystemReader):
    """Reads tensors of our list, from `files` only. Raises UserError if parts are no such, or lack."""

    def __init__(self, folder: Path, files: dict[str, str], tensors: dict[str, tuple]):
        super().__init__(folder)
        found, places = {}, {}
        for path, (size, dtype, parts) in tensors.items():
            chunks = [ChunkStorageMetadata(*map(torch.Size, part[:2])) for part in parts]
            found[path] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(size), chunks)
            for begin, _, file, offset, length in parts:
                places[MetadataIndex(path, begin)] = _StorageInfo(file, offset, length)
                if file not in files or Path(file).name != file:
                    raise UserError(f"refused, {one_line(path)} is in a file that is none of its own")
            if sum(chunk.sizes.numel() for chunk in chunks) != math.prod(size):
                raise UserError(f"damaged, a part of {one_line(path)} is missing")
        self.list = Metadata(found, storage_data=places, storage_meta=StorageMeta())

    def read_metadata(self, *args, **kwargs) -> Metadata:
        return self.list

    def _slice_file(self, file, place: _StorageInfo) -> _View:
        if place.offset + place.length > os.fstat(file.fileno()).st_size:
            raise UserError(f"{place.relative_path}: cut short")
        check_archive(view := _View(file, place.offset, place.length))
        view.seek(0)
        return view


def _verify(folder: Path, files: dict[str, str]) -> None:
    """Raises UserError if files are missing, or have other SHA-256 than the checkpoint says."""
    for name in files:
        if not (folder / name).is_file():  # but a device, which has no end
            raise UserError(f"{name}: no such file")
    with ThreadPoolExecutor(HASHED_TOGETHER) as pool:
        found = pool.map(lambda name: sha256(folder / name), files)
        for (name, digest), ours in zip(files.items(), found, strict=True):
            if ours != digest:
                raise UserError(f"damaged, {name} has not the SHA-256 that the checkpoint says")


def fill(
    content: dict, folder: Path, like: Callable[[str], Tensor | None] | None, optimizer: bool = True
) -> dict:
    """Puts the tensors into a checkpoint: those of `folder` in place of their paths, if it is in parts.

    Without `optimizer` the optimiser's entry of one in parts is left out. For a sharded model `like` is what
    `Sharded.like` returns: only this process's parts are read. Raises UserError where files are missing or
    damaged; of the processes of such a model only the first checks that.
    """
    shards, targets = content.pop("shards", None), {}
    with reading(folder, "cannot be read"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each process reads by itself
        reader = None
        if shards:
            reader = _Reader(folder, **shards)
            if like is None or not torch.distributed.get_rank():
                _verify(folder, shards["files"])

        def put(path: str, value):
            weight = like(path) if like is not None else None
            if shards and isinstance(value, str) and value == path:
                found = reader.list.state_dict_metadata[path]
                value = targets[path] = torch.empty(found.size, dtype=found.properties.dtype)
            if isinstance(weight, DTensor) and isinstance(value, Tensor) and value.shape == weight.shape:
                if path in targets:
                    value = targets[path] = torch.empty_like(weight)
                else:
                    place = weight.device_mesh, weight.placements
                    value = distribute_tensor(value.to(weight.device), *place, src_data_rank=None)
            return value

        if shards and not optimizer:
            content.pop("optimizer", None)
        content |= walk({key: content[key] for key in TREES if key in content}, put)
        try:
            if targets:
                load(targets, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
    return content
