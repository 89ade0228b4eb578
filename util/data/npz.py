"""Reads npz files of unknown origin: checks headers before data, and never runs code from the file."""

import math
import struct
import zipfile
from pathlib import Path

import numpy as np

from util.data.source import Mapped
from util.errors import reading

MAX_COMPRESSION = (
    100  # images and statistics compress less; without a bound a small file could fill the memory
)


class Npz:
    """The arrays of an npz file. Raises UserError for one that is damaged, runs code or fills the memory.

    arrays     name -> (dtype, shape), read from the headers alone
    max_bytes  the largest array that is decompressed; default: MAX_COMPRESSION times its compressed size
    """

    def __init__(self, path: Path, max_bytes: int | None = None):
        self.path, self.arrays, self.max_bytes = path, {}, max_bytes
        self._offsets: dict[str, int] = {}  # where uncompressed bytes begin in the file
        with reading(path, "cannot be read as npz", "; get it again"), zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    self._read_header(archive, info)

    def _read_header(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        name = info.filename.removesuffix(".npy")
        with archive.open(info) as file:
            old = np.lib.format.read_magic(file) == (1, 0)
            read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(file)
            header = file.tell()
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which could run code")
        if header + math.prod(shape) * dtype.itemsize != info.file_size:
            raise ValueError(f"{name} says it is {dtype} {shape}, but has {info.file_size - header} bytes")
        stored = info.compress_type == zipfile.ZIP_STORED
        if self.max_bytes is None and info.file_size > MAX_COMPRESSION * max(info.compress_size, 64):
            raise ValueError(
                f"{name} would be {info.file_size} bytes from {info.compress_size}: a decompression bomb"
            )
        if self.max_bytes is not None and not stored and info.file_size > self.max_bytes:
            raise ValueError(
                f"{name} would be {info.file_size} bytes, more than {self.max_bytes}; save it uncompressed"
            )
        self.arrays[name] = dtype, shape
        if stored and dtype.kind in "biu" and len(shape) > 1 and not fortran_order:
            with open(self.path, "rb") as file:
                file.seek(info.header_offset)
                name_length, extra_length = struct.unpack("<26xHH", file.read(30))
            self._offsets[name] = info.header_offset + 30 + name_length + extra_length + header

    def describe(self, name: str) -> str:
        """Dtype and shape of an array for a message, or "missing"."""
        return " ".join(map(str, self.arrays.get(name, ["missing"])))

    def array(self, name: str) -> Mapped | np.ndarray:
        """The array `name`. Uncompressed integers with rows stay in the file, and are read when used."""
        with reading(self.path, f"{name} cannot be read", "; get the file again"):
            if name in self._offsets:
                dtype, shape = self.arrays[name]
                return Mapped(str(self.path), self._offsets[name], shape, dtype.str)
            with np.load(self.path, allow_pickle=False) as file:
                return file[name]
