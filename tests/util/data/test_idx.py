"""IDX files, compressed or not and in every known place, give grey images; damaged ones are named in one line."""

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from util.crop import center_crop_arr
from util.data import idx, tool
from util.data.loader import ImageDataset, open_split
from util.errors import UserError
from util.pixels import RGB, Alphabet

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 12, 10), dtype=np.uint8)
LABELS = np.array([3, 1, 0, 2, 1, 9], np.uint8)
GREY = Alphabet(1)


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(folder, images=IMAGES, labels=LABELS, separator="-", packed=False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, images_of, labels_of in (("train", images, labels), ("t10k", images[::-1], labels[::-1] % 4)):
        for kind, array in (("images", images_of), ("labels", labels_of)):
            path = folder / f"{name}-{kind}{separator}idx{array.ndim}-ubyte{'.gz' * packed}"
            path.write_bytes(gzip.compress(idx_bytes(array)) if packed else idx_bytes(array))


@pytest.mark.parametrize("place", [".", "raw", "MNIST/raw"])
@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("packed", [False, True])
def test_images_labels_and_classes_come_back(place, separator, packed, tmp_path):
    write(tmp_path / place, separator=separator, packed=packed)
    for split, images, labels in (("train", IMAGES, LABELS), ("val", IMAGES[::-1], LABELS[::-1] % 4)):
        data = ImageDataset(open_split(tmp_path, split), (12, 10), GREY, seed=0, flip=True, training=True)
        assert data.source.kind == "IDX files of 10 x 12 px"
        assert data.classes == [str(i) for i in range(10)]  # of both, although val has fewer
        assert data.source.labels.tolist() == labels.tolist()
        for epoch in (0, 1):  # never mirrored
            values = torch.stack([data[epoch, i][0] for i in range(6)])
            assert values.dtype == torch.uint8
            assert np.array_equal(values[:, 0], images)
    assert data.source.name(5).endswith("ubyte.gz, row 5" if packed else "ubyte, row 5")


def test_samples_become_values_and_are_scaled_and_cropped_as_images_are(tmp_path):
    write(tmp_path)
    source = open_split(tmp_path, "train")
    few = Alphabet(1, 17)
    assert np.array_equal(source.cells(2, (12, 10), few)[0], np.rint(IMAGES[2] * (16 / 255)))
    assert np.array_equal(
        source.cells(2, (6, 8), GREY)[0], center_crop_arr(Image.fromarray(IMAGES[2]), (6, 8))
    )
    assert np.array_equal(source.cells(2, (12, 10), RGB)[1], IMAGES[2])
    with pytest.raises(
        UserError,
        match=r"train-images-idx3-ubyte, row 0: an image has two axes, .* a model of 12x, 1 channel of 256 ordinal",
    ):
        source.check((12,), GREY)


def test_uncompressed_files_are_preferred_and_mapped(tmp_path):
    write(tmp_path, np.tile(IMAGES, (100, 1, 1)), np.tile(LABELS, 100))
    write(tmp_path, packed=True)
    source = open_split(tmp_path, "train")
    assert len(source) == 600
    assert len(pickle.dumps(source)) < source.labels.nbytes + 2000 < 600 * 120


def test_packing_keeps_the_values(tmp_path):
    write(tmp_path, packed=True)
    flags = "--num_workers 0 --img_size 12x10 --channels 1 --num_values 2"
    assert tool.main(["pack", str(tmp_path), str(tmp_path / "pack"), *flags.split()]) == 0
    data = ImageDataset(open_split(tmp_path / "pack", "train"), (12, 10), Alphabet(1, 2), seed=0, flip=True)
    found = np.stack([data[0, i][0].numpy() for i in range(6)])
    assert np.array_equal(found[:, 0], IMAGES > 127)
    assert tool.main(["check", str(tmp_path), "--num_workers", "0"]) == 0


def cut(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])


def lie(*shape: int, packed: bool = True, size: int = 720):
    def damage(folder):
        (folder / "train-images-idx3-ubyte.gz").unlink()
        content = struct.pack(">4B3I", 0, 0, 8, 3, *shape) + bytes(size)
        name = "train-images-idx3-ubyte" + ".gz" * packed
        (folder / name).write_bytes(gzip.compress(content) if packed else content)

    return damage


def content(name: str, what: bytes):
    return lambda folder: (folder / name).write_bytes(what)


IMAGES_GZ, LABELS_GZ = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
BAD = {
    "cut": (cut, f"{IMAGES_GZ}: cannot be read as an IDX file .*; get it again"),
    "no gzip": (content(IMAGES_GZ, b"text"), f"{IMAGES_GZ}: cannot be read as an IDX file"),
    "empty": (content(IMAGES_GZ, b""), f"{IMAGES_GZ}: cannot be read as an IDX file"),
    "wrong magic": (content(IMAGES_GZ, gzip.compress(idx_bytes(LABELS))), r"does not begin with 0, 0, 8, 3 and 3 lengths"),
    "labels of floats": (content(LABELS_GZ, gzip.compress(b"\0\0\x0d\1\0\0\0\6" + bytes(24))), r"begin with 0, 0, 8, 1"),
    "half a header": (content(IMAGES_GZ, gzip.compress(b"\0\0\x08\3\0\0")), r"does not begin with"),
    "too many": (lie(6, 12, 11), r"its header says \(6, 12, 11\), 792 bytes, but there are 720"),
    "too few": (lie(6, 12, 9), r"its header says \(6, 12, 9\), 648 bytes, but there are more"),
    "a bomb": (lie(2**31, 2**31, 2**31), "bytes, more than 2147483648; unpack it"),
    "a mapped lie": (lie(6, 12, 11, packed=False), r"train-images-idx3-ubyte: .* 792 bytes, but there are 720"),
    "a large mapped lie": (lie(2**31, 2**31, 9, packed=False), "but there are 720"),
    "no images": (lie(0, 12, 10, size=0), "it is empty"),
    "a line": (lie(1, 1, 60000, size=60000), "its images of 60000 x 1 pixels are too thin to crop"),
    "other labels": (content(LABELS_GZ, gzip.compress(idx_bytes(LABELS[:5]))), rf"{LABELS_GZ}: labels are uint8 \(5,\), not 6 integers"),
    "no labels": (lambda folder: (folder / LABELS_GZ).unlink(), "train-labels-idx1-ubyte is missing, and so is its .gz"),
    "no training": (lambda folder: (folder / IMAGES_GZ).unlink(), "train-images-idx3-ubyte is missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_damaged_files_are_named_in_one_line(kind, tmp_path):
    damage, message = BAD[kind]
    write(tmp_path, packed=True)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as refused:
        open_split(tmp_path, "train")
    assert str(refused.value).startswith(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_a_small_file_cannot_fill_the_memory(tmp_path, monkeypatch):
    """A header that says little, before much that is compressed: no more is read than the header says."""
    write(tmp_path, packed=True)
    (tmp_path / IMAGES_GZ).write_bytes(gzip.compress(idx_bytes(np.zeros((2, 4, 4), np.uint8)) + bytes(2**24)))
    sizes, read = [], gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda file, size=-1: sizes.append(size) or read(file, size))
    with pytest.raises(UserError, match="32 bytes, but there are more"):
        open_split(tmp_path, "train")
    assert sizes == [16, 33]


def test_two_data_sets_in_one_folder_are_refused(tmp_path):
    for name in ("MNIST", "FashionMNIST"):
        write(tmp_path / name / "raw")
    with pytest.raises(
        UserError, match=r"has IDX files in FashionMNIST/raw, MNIST/raw; give one of these folders"
    ):
        open_split(tmp_path, "train")
    assert len(open_split(tmp_path / "MNIST", "train")) == 6
    assert idx.idx_folder(tmp_path / "nowhere") is None
