"""Arrays in .npy and .npz files give the values that they hold; what they cannot give is named in one line."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from util.data import arrays, tool
from util.data.loader import ImageDataset, open_dataset, open_split
from util.dist import World
from util.errors import UserError
from util.pixels import RGB, Alphabet

NOTES = Alphabet(4, 50, "categorical")
HOW = dict(class_num=None, seed=0, flip=True, shift=0, strict=False, world=World(), num_workers=0)


def numbers(*shape: int, top: int = 50, dtype=np.int64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, top, shape).astype(dtype)


def read(path, split: str, shape, alphabet, **changes) -> np.ndarray:
    """The values of a split, (N, *shape, C)."""
    data = open_dataset(path, split, shape, alphabet, **{**HOW, **changes})
    values = torch.stack([data[0, i][0] for i in range(len(data))])
    assert values.dtype == alphabet.dtype
    return values.movedim(1, -1).numpy()


@pytest.mark.parametrize(
    ("shape", "alphabet"),
    [
        ((16,), NOTES),
        ((16,), Alphabet(1, 2)),
        ((6, 4), Alphabet(1, 17)),
        ((6, 4), Alphabet(2, 65536)),
        ((4, 6, 8), Alphabet(2, 5)),
    ],
)
@pytest.mark.parametrize("dtype", [np.int64, ">i4", np.uint16])
def test_values_of_any_grid_and_alphabet_come_back(shape, alphabet, dtype, tmp_path):
    values = numbers(5, *shape, alphabet.channels, top=alphabet.num_values, dtype=dtype).clip(0)
    if np.dtype(dtype).itemsize > 2:
        values[0].flat[0] = alphabet.num_values - 1
    np.save(tmp_path / "train.npy", values)
    np.save(tmp_path / "val.npy", np.asfortranarray(values[::-1]))
    assert np.array_equal(read(tmp_path, "train", shape, alphabet), values)
    assert np.array_equal(read(tmp_path, "val", shape, alphabet), values[::-1])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_files_have_labels_and_names(save, tmp_path):
    values, labels = numbers(20, 8, 4), np.arange(20) % 3
    save(tmp_path / "train.npz", notes=values, labels=labels, classes=["bass", "solo", "tutti"])
    save(tmp_path / "val.npz", anything=values[:2], labels=np.array([0, 1], np.uint8))
    train, val = (open_split(tmp_path, split) for split in ("train", "val"))
    assert (train.kind, val.kind) == ("arrays of 8x4 int64",) * 2
    assert train.classes == val.classes == ["bass", "solo", "tutti"]
    assert (train.labels.tolist(), val.labels.tolist()) == (labels.tolist(), [0, 1])
    assert np.array_equal(read(tmp_path, "train", (8,), NOTES), values)
    assert val.name(1) == f"{tmp_path}/val.npz, row 1"


def test_labels_lie_beside_an_npy_and_classes_are_those_of_training(tmp_path):
    for split, labels in (("train", [0, 4, 1]), ("val", [1, 0, 2])):
        np.save(tmp_path / f"{split}.npy", numbers(3, 8, 4))
        np.save(tmp_path / f"{split}_labels.npy", labels)
    for split in ("train", "val"):
        assert open_split(tmp_path, split).classes == ["0", "1", "2", "3", "4"]
    (tmp_path / "val_labels.npy").unlink()
    with pytest.raises(UserError, match=r"val.npy: has no labels, but train.npy has; add them"):
        open_split(tmp_path, "val")
    np.save(tmp_path / "val_labels.npy", [1, 0, 7])
    with pytest.raises(UserError, match=r"val.npy: the label of row 2 is 7, not from 0 to 4"):
        open_split(tmp_path, "val")


@pytest.mark.parametrize("alone", ["data.npy", "folder/train.npy"])
def test_of_one_file_every_tenth_of_each_class_is_held_out(alone, tmp_path):
    values, labels = numbers(40, 8, 4), np.arange(40) % 2
    path = tmp_path / alone
    path.parent.mkdir(exist_ok=True)
    np.save(path, values)
    np.save(path.with_name(f"{path.stem}_labels.npy"), labels)
    root = path if alone == "data.npy" else path.parent
    held_out = [0, 1, 20, 21]
    val, train = open_split(root, "val"), open_split(root, "train")
    assert val.kind == "arrays of 8x4 int64, every 10th for validation"
    assert [val.name(i) for i in range(4)] == [f"{path}, row {row}" for row in held_out]
    assert np.array_equal(read(root, "val", (8,), NOTES), values[held_out])
    assert np.array_equal(read(root, "train", (8,), NOTES), np.delete(values, held_out, 0))
    assert train.labels.tolist() == np.delete(labels, held_out).tolist()


def test_one_channel_may_lack_its_axis(tmp_path):
    values = numbers(20, 6, 4, top=17)
    np.savez(tmp_path / "a.npz", values)
    assert np.array_equal(
        read(tmp_path / "a.npz", "train", (6, 4), Alphabet(1, 17))[..., 0], np.delete(values, [0, 10], 0)
    )


def test_arrays_are_shifted_but_never_mirrored(tmp_path):
    values = numbers(200, 4, 6, 8, 2)
    np.save(tmp_path / "train.npy", values)
    alphabet = Alphabet(2, 50, "categorical")
    kept = np.delete(values, np.arange(0, 200, 10), 0)
    assert np.array_equal(read(tmp_path, "train", (4, 6, 8), alphabet, flip=True), kept)
    shifted = read(tmp_path, "train", (4, 6, 8), alphabet, shift=1)
    padded, met = np.pad(kept, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)), mode="edge"), set()
    for before, after in zip(padded, shifted, strict=True):
        places = [
            p
            for p in np.ndindex(3, 3, 3)
            if np.array_equal(
                before[tuple(slice(i, i + n) for i, n in zip(p, (4, 6, 8), strict=True))], after
            )
        ]
        assert len(places) == 1
        met.update(places)
    assert len(met) == 27


def test_rows_stay_in_the_file_and_a_worker_is_handed_their_place(tmp_path):
    values = numbers(3000, 8, 4)
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "b.npz", values, labels=np.zeros(3000, int))
    for name in ("a.npy", "b.npz"):
        source = open_split(tmp_path / name, "train")
        travelled = pickle.dumps(source)
        assert len(travelled) < source.labels.nbytes + source.rows.nbytes + 2000 < values.nbytes
        assert torch.equal(pickle.loads(travelled).cells(5, (8,), NOTES), source.cells(5, (8,), NOTES))


@pytest.mark.parametrize(
    ("shape", "alphabet", "message"),
    [
        ((8,), Alphabet(3, 50), r"each row is of shape \(8, 4\), but a model of 8x, 3 channels of 50 ordinal values needs \(8, 3\)"),
        ((4, 8), NOTES, r"a model of 4x8 px, 4 channels of 50 categorical values needs \(4, 8, 4\)"),
        ((64, 64), RGB, r"a model of 64 px needs \(64, 64, 3\)"),
        ((8,), Alphabet(4, 40), r"row \d+: a value is 4\d, not from 0 to 39"),
    ],
)  # fmt: skip
def test_another_grid_or_alphabet_is_refused_when_the_data_are_opened(shape, alphabet, message, tmp_path):
    np.save(tmp_path / "data.npy", numbers(30, 8, 4))
    with pytest.raises(UserError, match=r"data.npy(: |, ).*" + message):
        open_dataset(tmp_path / "data.npy", "train", shape, alphabet, **HOW)


@pytest.mark.parametrize("odd", [-1, 50, 2**40])
def test_a_late_value_out_of_range_is_a_bad_image(odd, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(arrays, "LOOKED_AT", 5)
    values = numbers(30, 8, 4)
    values[22, 3, 1] = odd
    np.save(tmp_path / "train.npy", values)
    np.save(tmp_path / "val.npy", values[:5])
    message = rf"train.npy, row 22: a value is {odd}, not from 0 to 49"
    data = open_dataset(tmp_path, "train", (8,), NOTES, **HOW)
    batch, bad = data.__getitems__([(0, 21), (0, 22)])
    assert ([index for *_, index in batch], list(bad)) == ([21, 23], [22])
    with pytest.raises(UserError, match=f"--strict_data: 1 bad image.*{message}"):
        open_dataset(tmp_path, "train", (8,), NOTES, **{**HOW, "strict": True})
    flags = "--num_workers 0 --img_size 8x --channels 4 --num_values 50 --value_kind categorical"
    assert tool.main(["check", str(tmp_path), *flags.split()]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/train.npy, row 22: a value is {odd}, not from 0 to 49"
    assert lines[1:] == [
        "train: arrays of 8x4 int64, 0 classes, 30 images, 1 bad",
        "val: arrays of 8x4 int64, 0 classes, 5 images, 0 bad",
    ]


def test_check_without_flags_finds_what_no_alphabet_has(tmp_path, capsys):
    values = numbers(20, 8, 4)
    np.save(tmp_path / "a.npy", values)
    assert tool.main(["check", str(tmp_path / "a.npy"), "--num_workers", "0"]) == 0
    values[0, 0, 0] = -3  # the first row is for validation
    np.save(tmp_path / "a.npy", values)
    assert tool.main(["check", str(tmp_path / "a.npy"), "--num_workers", "0"]) == 1
    assert "a.npy, row 0: a value is -3, not from 0 to 65535" in capsys.readouterr().out


class RunsCode:
    def __reduce__(self):
        return os._exit, (3,)


def header(shape: str, dtype: str = "|u1") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def saved(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npz(path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


VALUES = numbers(20, 8, 4)
HOSTILE = {
    "floats": (lambda folder: np.save(folder / "train.npy", VALUES / 2), "its values are float64; they must be integers"),
    "text": (lambda folder: np.save(folder / "train.npy", VALUES.astype(str)), "its values are <U21; they must be integers"),
    "no grid": (lambda folder: np.save(folder / "train.npy", VALUES[:, 0, 0]), r"an array of shape \(20,\); it must be \(N, \*shape, C\)"),
    "nothing": (lambda folder: np.save(folder / "train.npy", VALUES[:0]), r"an array of shape \(0, 8, 4\)"),
    "objects": (lambda folder: (folder / "train.npy").write_bytes(saved(np.array([[RunsCode()]], object))), "cannot be read as npy .*Python objects"),
    "a pickle": (lambda folder: (folder / "train.npy").write_bytes(pickle.dumps(RunsCode())), "cannot be read as npy"),
    "empty": (lambda folder: (folder / "train.npy").write_bytes(b""), "cannot be read as npy"),
    "a lying header": (lambda folder: (folder / "train.npy").write_bytes(header("(9000000000, 8, 4)") + bytes(99)), "cannot be read as npy"),
    "a negative length": (lambda folder: (folder / "train.npy").write_bytes(header("(-20, -8, 4)") + bytes(640)), "cannot be read as npy"),
    "a shape that is code": (lambda folder: (folder / "train.npy").write_bytes(header("__import__('os')._exit(3)")), "cannot be read as npy"),
    "a cut file": (lambda folder: (folder / "train.npy").write_bytes(saved(VALUES)[:-1]), "cannot be read as npy"),
    "objects in npz": (lambda folder: npz(folder / "train.npz", a=saved(np.array([[RunsCode()]], object))), "a holds Python objects, which could run code"),
    "names of objects": (lambda folder: npz(folder / "train.npz", a=saved(VALUES), labels=saved(np.zeros(20, int)), classes=saved(np.array([RunsCode()], object))), "classes holds Python objects"),
    "a bomb": (lambda folder: npz(folder / "train.npz", a=saved(np.zeros((2000, 8, 4), np.uint8))), "a would be 64128 bytes, more than 50000; save it uncompressed"),
    "two arrays": (lambda folder: np.savez(folder / "train.npz", a=VALUES, b=VALUES), "must hold one array besides labels and classes, but it has a, b"),
    "no array": (lambda folder: np.savez(folder / "train.npz", labels=VALUES), "must hold one array besides labels and classes, but it has none"),
    "few labels": (lambda folder: np.savez(folder / "train.npz", a=VALUES, labels=[1, 2]), r"labels are int64 \(2,\), not 20 integers from 0"),
    "float labels": (lambda folder: np.savez(folder / "train.npz", a=VALUES, labels=np.zeros(20)), "labels are float64"),
    "a negative label": (lambda folder: np.savez(folder / "train.npz", a=VALUES, labels=np.arange(20) - 1), "the label of row 0 is -1, not from 0 to 18"),
    "few names": (lambda folder: np.savez(folder / "train.npz", a=VALUES, labels=np.arange(20), classes=["a", "b"]), "the label of row 2 is 2, not from 0 to 1"),
    "names that are numbers": (lambda folder: np.savez(folder / "train.npz", a=VALUES, labels=np.arange(20), classes=[1, 2]), r"classes is int64 \(2,\); it must be a list of names"),
    "both kinds": (lambda folder: (np.save(folder / "train.npy", VALUES), np.savez(folder / "train.npz", VALUES)), "has train as npy and as npz; keep one of them"),
    "val alone": (lambda folder: np.save(folder / "val.npy", VALUES), "has val.npy but no train.npy or train.npz"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_cannot_be_used_is_named_in_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "MAX_BYTES", 50_000)
    make, message = HOSTILE[kind]
    make(tmp_path)
    with pytest.raises(UserError, match=message) as refused:
        open_split(tmp_path, "train")
    assert str(refused.value).startswith(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_other_files_and_arrays_beside_images_are_no_data(tmp_path):
    (tmp_path / "data.csv").touch()
    with pytest.raises(
        UserError, match=r"data.csv: a file of data must be .npy or .npz; other data are folders"
    ):
        open_split(tmp_path / "data.csv", "train")
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train.npy", VALUES)
    with pytest.raises(UserError, match="there is no image in it"):
        open_split(tmp_path, "train")


def test_an_array_is_no_image(tmp_path):
    np.save(tmp_path / "data.npy", VALUES)
    with pytest.raises(UserError, match=r"data.npy, row 0: an array of values, not an image"):
        open_split(tmp_path / "data.npy", "val").image(0)


def test_packs_of_arrays_hold_the_same_values_and_are_not_mirrored(tmp_path, capsys, monkeypatch):
    """Also where 16 bits are needed, and where a row is bad."""
    monkeypatch.setattr(arrays, "LOOKED_AT", 5)
    values = numbers(30, 8, 4, top=40_000)
    values[12, 0, 0] = 40_000
    np.save(tmp_path / "train.npy", values)
    flags = "--splits train --num_workers 0 --img_size 8x --channels 4 --num_values 40000"
    assert tool.main(["pack", str(tmp_path), str(tmp_path / "pack"), *flags.split()]) == 0
    assert "27 images of 8x, 4 channels of 40000 ordinal values, 1 bad" in capsys.readouterr().out
    alphabet = Alphabet(4, 40_000)
    packed, plain = (
        ImageDataset(open_split(root, "train"), (8,), alphabet, seed=0, flip=True, training=True)
        for root in (tmp_path / "pack", tmp_path)
    )
    assert (packed.source.shape, packed.source.alphabet) == ((8,), alphabet)
    (found, bad), (expected, _) = (data.__getitems__([(0, i) for i in range(27)]) for data in (packed, plain))
    assert list(bad.values()) == [f"{tmp_path}/train.npy, row 12: a value is 40000, not from 0 to 39999"]
    for (a, *_), (b, *_) in zip(found, expected, strict=True):
        assert a.dtype == b.dtype == torch.int32
        assert torch.equal(a, b)
    for shape, other in (
        ((8,), Alphabet(4, 256)),
        ((8,), Alphabet(4, 40_000, "categorical")),
        ((4, 2), alphabet),
    ):
        with pytest.raises(
            UserError,
            match=r"these packed images of 8x, 4 channels of 40000 ordinal values do not fit a model of .*; pack them with --img_size .* --channels 4 --num_values",
        ):
            ImageDataset(packed.source, shape, other, seed=0)
