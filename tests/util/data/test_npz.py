"""Good npz files come back; files that are damaged, run code or would fill the memory are refused."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from util.data.npz import Npz
from util.errors import UserError


def member(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue()


def header(shape: str, dtype: str = "|u1") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def pack(path, compression=zipfile.ZIP_STORED, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back(save, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
    save(tmp_path / "a.npz", arr_0=images, mu=np.arange(3.0), columns=np.asfortranarray(images))
    npz = Npz(tmp_path / "a.npz")
    assert npz.arrays == {
        "arr_0": (np.uint8, (7, 4, 5, 3)),
        "mu": (np.float64, (3,)),
        "columns": (np.uint8, (7, 4, 5, 3)),
    }
    assert (npz.describe("mu"), npz.describe("sigma")) == ("float64 (3,)", "missing")
    assert npz.array("mu").tolist() == [0, 1, 2]
    for name in ("arr_0", "columns"):
        rows = npz.array(name)
        assert np.array_equal(np.stack([rows[i] for i in range(7)]), images)
    if save is np.savez:
        moved = pickle.loads(pickle.dumps(npz.array("arr_0")))
        assert len(pickle.dumps(npz.array("arr_0"))) < 500, (
            "a worker gets the place in the file, not the images"
        )
        assert np.array_equal(moved[6], images[6])


class RunsCode:
    def __reduce__(self):
        return os._exit, (3,)


HOSTILE = {
    "objects": (
        lambda path: pack(path, arr_0=member(np.array([RunsCode()], dtype=object))),
        "could run code",
    ),
    "a bomb": (
        lambda path: pack(path, zipfile.ZIP_DEFLATED, mu=member(np.zeros(2**22, np.uint8))),
        "a decompression bomb",
    ),
    "a shape beyond the data": (
        lambda path: pack(path, arr_0=header("(2000000000, 1000)")),
        "but has 0 bytes",
    ),
    "a shape that is code": (
        lambda path: pack(path, arr_0=header("__import__('os')._exit(3)")),
        "cannot be read as npz",
    ),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(RunsCode())), "cannot be read as npz"),
    "a member that is none": (lambda path: pack(path, arr_0=b"no array"), "cannot be read as npz"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as npz"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_in_one_line(kind, tmp_path):
    make, message = HOSTILE[kind]
    make(tmp_path / "a.npz")
    with pytest.raises(UserError, match=message) as refused:
        Npz(tmp_path / "a.npz")
    assert str(refused.value).startswith(f"{tmp_path}/a.npz: ")
    assert "\n" not in str(refused.value)


def test_damaged_data_behind_a_good_header_is_refused_when_it_is_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", mu=np.random.default_rng(0).random(1000))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz: mu cannot be read \(.*\); get the file again"):
        Npz(tmp_path / "a.npz").array("mu")
    with pytest.raises(UserError, match=r"/none\.npz: cannot be read as npz \(.*No such file"):
        Npz(tmp_path / "none.npz")
