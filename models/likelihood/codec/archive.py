"""The bytes of compressed images (docs/codec.md).

An archive has a start of 16 bytes, a table, and the streams of the images one after the other. The start is
MAGIC, the CRC-32 of all that follows it, and the length of the table (both of 4 bytes, little-endian). The
table is JSON, compressed by zlib: {"headers": […], "images": [[…], […], […], […]], "names": […]}. The lists
of "images" have the number of each image's header, its index less the one before, its class or null, and the
length of its stream.
"""

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from math import prod

import numpy as np

from models.noise import MAX_SEED
from util.errors import UserError, one_line, reading

MAGIC = b"FRACTAL\x01"  # the last byte is the version of the format
START = struct.Struct("<8sII")
MAX_VALUES, MAX_INDEX, MAX_NAME = 2**26, 2**32, 255  # of an image; of a call; bytes
EXPANSION = 100  # how many times as many bytes as the archive its table has at most


@dataclass(frozen=True)
class Header:
    """How images were compressed.

    To decompress, all up to `constriction` must be the same; `decompress` sets the number of threads itself.

    model            a hash of the weights, and of the settings that decide the probabilities
    device … torch   what computed the probabilities; constriction: what rounded them
    seed             of the random orders of MAR levels
    steps            the number of steps of each level
    shape            of an image: channels, and cells along each axis
    rows             how many tiles go through the model together

    Raises UserError for what no header can have.
    """

    model: str
    device: str
    dtype: str
    threads: int
    torch: str
    constriction: str
    seed: int
    steps: tuple[int, ...]
    shape: tuple[int, ...]
    rows: int

    def __post_init__(self):
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            if kind == tuple[int, ...]:
                value, kind = tuple(value), int
                object.__setattr__(self, field.name, value)
            values = value if isinstance(value, tuple) else (value,)
            least = 0 if field.name == "seed" else 1
            if not values or not all(
                type(one) is kind and (kind is str or least <= one <= MAX_SEED) for one in values
            ):
                raise UserError(f"{field.name} {one_line(repr(value))}")
        if prod(self.shape) > MAX_VALUES:
            raise UserError(f"images of shape {self.shape} have more than {MAX_VALUES:,} values; cut them")


@dataclass(frozen=True)
class Stream:
    """The stream of one image, which had the number `index` in the call that compressed it.

    label  the class that it was compressed given, or None
    """

    header: Header
    index: int
    label: int | None
    data: bytes

    @property
    def bits(self) -> int:
        """The bits that the values take, without the CRC-32, the 1 after it, and what fills the last byte."""
        return 8 * len(self.data) - 8 + self.data[-1].bit_length() - 33


@dataclass(frozen=True)
class Archive:
    """Any number of compressed images, with a name for each of them or none at all."""

    streams: Sequence[Stream]
    names: Sequence[str] = ()

    def __post_init__(self):
        if len(self.names) not in (0, len(self.streams)):
            raise UserError(f"{len(self.names)} names for {len(self.streams)} images")
        if long := [name for name in self.names if len(name.encode()) > MAX_NAME]:
            raise UserError(f"the name {one_line(long[0])} has more than {MAX_NAME} bytes")

    def to_bytes(self) -> bytes:
        headers = list(dict.fromkeys(one.header for one in self.streams))
        numbers = {header: number for number, header in enumerate(headers)}
        images = [
            [numbers[one.header] for one in self.streams],
            np.diff([one.index for one in self.streams], prepend=0).tolist(),
            [one.label for one in self.streams],
            [len(one.data) for one in self.streams],
        ]
        table = {"headers": list(map(asdict, headers)), "images": images, "names": list(self.names)}
        packed = zlib.compress(json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode(), 9)
        body = b"".join([packed, *(one.data for one in self.streams)])
        return START.pack(MAGIC, zlib.crc32(body), len(packed)) + body

    @classmethod
    def from_bytes(cls, data: bytes, force: bool = False) -> "Archive":
        """Reads what `to_bytes` returned. Raises UserError for other bytes.

        force  goes on although the CRC-32 says that the archive was changed
        """
        if data[: len(MAGIC) - 1] != MAGIC[:-1] or len(data) < START.size:
            raise UserError("this is no archive of compressed images")
        magic, crc, length = START.unpack_from(data)
        if magic != MAGIC:
            raise UserError(f"an archive of version {magic[-1]}; this program reads version {MAGIC[-1]}")
        if crc != zlib.crc32(data[START.size :]) and not force:
            raise UserError("the archive is damaged or cut off: its CRC-32 differs; get it again")
        with reading("the archive", "damaged"):
            place, most = START.size + length, 2**16 + EXPANSION * len(data)
            table = json.loads(zlib.decompressobj().decompress(data[START.size : place], most))
            headers, streams, index = [Header(**header) for header in table["headers"]], [], 0
            for number, step, label, size in zip(*table["images"], strict=True):
                index += step
                given = [index, size - 1] + [label] * (label is not None)
                if not all(type(one) is int and 0 <= one <= MAX_INDEX for one in given):
                    raise ValueError(f"an image with index {index}, class {label} and {size} bytes")
                streams.append(Stream(headers[number], index, label, bytes(data[place : place + size])))
                place += size
            if place != len(data) or not all(isinstance(name, str) for name in table["names"]):
                raise ValueError("lengths or names do not fit")
            return cls(streams, list(table["names"]))


def join(archives: Sequence[bytes], names: Sequence[str] = ()) -> bytes:
    """Joins what `model.compress` returned to one archive, where equal headers are written once."""
    streams = [stream for data in archives for stream in Archive.from_bytes(data).streams]
    return Archive(streams, names).to_bytes()
