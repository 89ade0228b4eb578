"""The bytes of compressed images."""

import json
import tracemalloc
import zlib
from dataclasses import asdict, replace

import pytest

from models.likelihood.codec.archive import MAGIC, START, Archive, Header, Stream, join
from util.errors import UserError

HEADER = Header("0123456789abcdef", "cpu", "float32", 2, "2.14", "0.5", 7, (4, 16), (3, 8, 8), 64)


def stream(index: int, data: bytes = b"data", label: int | None = None, **changes) -> Stream:
    return Stream(replace(HEADER, **changes), index, label, data)


def forged(table: bytes, streams: bytes = b"") -> bytes:
    """An archive whose CRC fits."""
    packed = zlib.compress(table)
    return START.pack(MAGIC, zlib.crc32(packed + streams), len(packed)) + packed + streams


def table(**changes) -> bytes:
    """The table of an archive of one image whose stream has 4 bytes."""
    return json.dumps(
        {"headers": [asdict(HEADER)], "images": [[0], [0], [None], [4]], "names": [], **changes}
    ).encode()


def test_streams_and_names_come_back():
    streams = [
        stream(0),
        stream(2**32, b"\0"),
        stream(300, bytes(1000), 5),
        stream(1, b"x", 0, seed=2**63 - 1),
    ]
    for names in ((), ["a", "b/ä", "", "c" * 255]):
        found = Archive.from_bytes(Archive(streams, names).to_bytes())
        assert (list(found.streams), list(found.names)) == (streams, list(names))
    assert Archive.from_bytes(Archive([]).to_bytes()).streams == []


def test_equal_headers_are_written_once():
    parts = [Archive([stream(index)]).to_bytes() for index in range(50)]
    joined = join(parts)
    assert Archive.from_bytes(joined).streams == [stream(index) for index in range(50)]
    assert len(joined) < len(parts[0]) + 50 * 5
    assert Archive.from_bytes(join([joined, *parts])).streams == [stream(i) for i in [*range(50)] * 2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no archive"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "no archive"),
        (MAGIC + bytes(5), "no archive"),
        (MAGIC[:-1] + bytes([2]) + bytes(20), "version 2; this program reads version 1"),
        (MAGIC + bytes(range(20)), "CRC-32"),
        (Archive([stream(0)]).to_bytes()[:-1], "CRC-32"),
        (START.pack(MAGIC, zlib.crc32(b"abc"), 3) + b"abc", "damaged"),
        (START.pack(MAGIC, zlib.crc32(b"abc"), 2**32 - 1) + b"abc", "damaged"),
        (forged(b"[" * 100_000), "damaged"),
        (forged(b" " * 2**27), "damaged"),  # more than a table may have
        (forged(b"{}"), "damaged"),
        (forged(table(headers=[{}]), b"data"), "missing"),
        (forged(table(headers=[{**asdict(HEADER), "a": 1}]), b"data"), "unexpected"),
        (forged(table(headers=[]), b"data"), "damaged"),
        (forged(table()), "lengths or names do not fit"),
        (forged(table(), b"more data"), "lengths or names do not fit"),
        (forged(table(images=[[0], [-1], [None], [4]]), b"data"), "an image"),
        (forged(table(images=[[0], [0], [None], [-4]]), b"data"), "an image"),
        (forged(table(images=[[0], [2**40], [None], [4]]), b"data"), "an image"),
        (forged(table(images=[[0], [0], [None], [0]])), "an image"),
        (forged(table(images=[[0], [0.5], [None], [4]]), b"data"), "an image"),
        *((forged(table(images=[[0], [0], [label], [4]]), b"data"), "an image") for label in (-1, "x", [1], {}, 0.5)),
        (forged(table(names=["a", "b"]), b"data"), "2 names for 1 images"),
        (forged(table(names=[1]), b"data"), "lengths or names do not fit"),
        (forged(table(names=5), b"data"), "damaged"),
        (forged(table(names=["a" * 300]), b"data"), "more than 255 bytes"),
    ],
)  # fmt: skip
def test_what_is_no_archive_is_an_error_of_one_line(data, message):
    with pytest.raises(UserError, match=message) as error:
        Archive.from_bytes(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"threads": True}, {"threads": -1}, {"threads": 1.0}, {"seed": 2**63}, {"steps": []}, {"steps": [0.5]},
        {"steps": [[1]]}, {"steps": 4}, {"shape": [3, 0, 8]}, {"shape": [3, 2**14, 2**14]}, {"rows": 0},
        {"threads": 0}, {"model": 5}, {"model": None},
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_is_refused(changes):
    with pytest.raises((ValueError, TypeError)):
        Header(**{**asdict(HEADER), **changes})


def test_names_that_do_not_fit_are_refused_before_anything_is_written():
    for names, message in ((["only one"], "1 names for 2 images"), (["ä" * 128, ""], "more than 255 bytes")):
        with pytest.raises(UserError, match=message):
            join([Archive([stream(0)]).to_bytes(), Archive([stream(1)]).to_bytes()], names)


def test_a_small_file_takes_little_memory():
    lists = json.dumps({"headers": [], "images": [[], [], [], []], "names": [[]] * 2_000_000}).encode()
    many = table(images=[[0] * 500_000, [1] * 500_000, [None] * 500_000, [0] * 500_000])
    for data in (forged(lists), forged(many)):
        tracemalloc.start()
        with pytest.raises(UserError, match="damaged"):
            Archive.from_bytes(data)
        assert tracemalloc.get_traced_memory()[1] < 2000 * len(data) + 2**20
        tracemalloc.stop()


def test_a_damaged_archive_can_be_read_on_demand():
    data = bytearray(Archive([stream(0, b"abc"), stream(1, b"def")]).to_bytes())
    data[-1] ^= 1
    with pytest.raises(UserError, match="CRC-32"):
        Archive.from_bytes(bytes(data))
    found = Archive.from_bytes(bytes(data), force=True)
    assert [one.data for one in found.streams] == [b"abc", b"deg"]
