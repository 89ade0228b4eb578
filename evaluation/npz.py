"""npz files of unknown origin: what they hold is known before any of it is read, and nothing in them is run."""

import math
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from util.data.source import Mapped
from util.errors import UserError, one_line

HARDEST = 100  # times: no image or statistic is compressed further, and a megabyte must not become a gigabyte
BROKEN = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)


class Npz:
    """The arrays of an npz file. Raises UserError for one that is missing, damaged, hostile or another.

    shapes   name -> shape; dtypes  name -> dtype
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"{path}: no such npz file")
        self.path, self.shapes, self.dtypes, self._places = path, {}, {}, {}
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if info.filename.endswith(".npy"):
                        self._note(archive, info)
        except BROKEN as error:
            raise UserError(f"{path}: cannot be read as npz ({one_line(error)}); get it again") from error

    def _note(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        name = info.filename.removesuffix(".npy")
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, by_columns, dtype = read(file)
            header = file.tell()
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which could run code")
        if header + math.prod(shape) * dtype.itemsize != info.file_size:
            raise ValueError(f"{name} says it is {dtype} {shape}, but has {info.file_size - header} bytes")
        if info.file_size > HARDEST * max(info.compress_size, 64):
            raise ValueError(
                f"{name} would be {info.file_size} bytes from {info.compress_size}: a decompression bomb"
            )
        self.shapes[name], self.dtypes[name] = shape, dtype
        if info.compress_type == zipfile.ZIP_STORED and not by_columns:
            with open(self.path, "rb") as file:
                file.seek(info.header_offset)
                name_length, extra_length = struct.unpack("<26xHH", file.read(30))
            self._places[name] = info.header_offset + 30 + name_length + extra_length + header

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def array(self, name: str) -> np.ndarray:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return file[name]
        except BROKEN as error:
            raise UserError(
                f"{self.path}: {name} cannot be read ({one_line(error)}); get the file again"
            ) from error

    def rows(self, name: str) -> Mapped | np.ndarray:
        """An array of bytes: where it lies in the file if it is not compressed, else read."""
        if name not in self._places or self.dtypes[name] != np.uint8:
            return self.array(name)
        try:
            return Mapped(str(self.path), self._places[name], self.shapes[name])
        except BROKEN as error:
            raise UserError(
                f"{self.path}: {name} cannot be read ({one_line(error)}); get the file again"
            ) from error
