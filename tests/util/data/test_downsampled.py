import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from conftest import random_values, score, train_tiny
from util.data.downsampled import Downsampled, read_batch
from util.data.loader import ImageDataset, open_split
from util.data.source import Mapped
from util.errors import UserError
from util.pixels import RGB

LABELS = [3, 1, 2, 1, 3, 2]


def batch(seed: int = 0) -> dict:
    """Six 8 px images in the form of train_data_batch_1: rows of planar RGB, labels from 1, and their mean."""
    rows = random_values(6, 8, seed).flatten(1).numpy()
    return {"data": rows, "labels": LABELS, "mean": rows.mean(0)}


def python2(content: dict) -> bytes:
    """The pickle that Python 2 writes: its text is bytes in Python 3, and NumPy's functions have old names."""
    data, labels = content["data"], content["labels"]
    parts = [
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    ]
    parts += [
        b"(K\x01K",
        bytes([len(data)]),
        b"K",
        bytes([data.shape[1]]),
        b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R",
    ]
    parts += [
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T",
        len(data.tobytes()).to_bytes(4, "little"),
    ]
    parts += [data.tobytes(), b"tbU\x06labels](", *(b"K" + bytes([label]) for label in labels), b"eu."]
    return b"".join(parts)


@pytest.mark.parametrize("protocol", [*range(6), "Python 2", "npz", "compressed npz"])
def test_batches_of_every_format_give_their_rows_and_labels(protocol, tmp_path):
    content, path = batch(), tmp_path / "val_data"
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    elif protocol == "Python 2":
        path.write_bytes(python2(content))
    else:
        path = tmp_path / "val_data.npz"
        (np.savez if protocol == "npz" else np.savez_compressed)(path, **content)
    source = open_split(tmp_path, "val")
    assert source.labels.tolist() == [label - 1 for label in LABELS]
    assert source.classes == ["1", "2", "3"]
    for i, values in enumerate(random_values(6, 8)):
        assert (ImageDataset(source, (8, 8), RGB, seed=0)[0, i][0] == values).all()
    in_the_file = protocol in (3, 4, 5, "Python 2", "npz")
    assert isinstance(source.blocks[0], Mapped) == in_the_file


def test_rows_are_not_taken_from_a_place_in_the_file_that_only_begins_like_them(tmp_path):
    content = batch()
    preview = {"preview": content["data"][[0, 0, 0, 0, 0, 0]], **content}
    (tmp_path / "val_data").write_bytes(pickle.dumps(preview, protocol=4))
    source = open_split(tmp_path, "val")
    assert (source.cells(5, (8, 8), RGB) == random_values(6, 8)[5]).all()


def test_a_mapped_source_travels_to_another_process_without_its_images(tmp_path):
    np.savez(tmp_path / "val_data.npz", data=np.tile(batch()["data"], (100, 1)), labels=np.tile(LABELS, 100))
    source = open_split(tmp_path, "val")
    travelling = pickle.dumps(source)
    assert len(travelling) < 20_000 < source.labels.nbytes + 600 * 192
    assert (pickle.loads(travelling).cells(7, (8, 8), RGB) == source.cells(7, (8, 8), RGB)).all()


def test_training_from_ten_batches(tmp_path):
    for number in range(1, 11):
        (tmp_path / f"train_data_batch_{number}").write_bytes(pickle.dumps(batch(number), protocol=4))
    np.savez(tmp_path / "val_data.npz", **batch(11))
    train = open_split(tmp_path, "train")
    assert train.name(55).endswith("train_data_batch_10, row 1")
    assert (train.cells(55, (8, 8), RGB) == random_values(6, 8, 10)[1]).all()
    log = train_tiny(tmp_path, tmp_path / "out")
    assert (
        "downsampled ImageNet, 10 files of 8 px and downsampled ImageNet, 1 file of 8 px, 3 classes, 60 + 6"
        in log[0]["note"]
    )
    assert score(log, "val/num_images") == 6


def test_with_map_clsloc_classes_are_the_synsets_as_folders_number_them(tmp_path):
    np.savez(tmp_path / "val_data.npz", **batch())
    (tmp_path / "map_clsloc.txt").write_text(
        "n02119789 1 kit_fox\nn01443537 2 goldfish\nn02100735 3 English_setter\n"
    )
    source = open_split(tmp_path, "val")
    assert source.classes == ["n01443537", "n02100735", "n02119789"]
    assert source.labels.tolist() == [{1: 2, 2: 0, 3: 1}[label] for label in LABELS]
    (tmp_path / "map_clsloc.txt").write_text("n02119789 1 kit_fox\nn01443537 2 goldfish\n")
    with pytest.raises(UserError, match=r"map_clsloc.txt: has no line for label 3"):
        open_split(tmp_path, "val")
    (tmp_path / "map_clsloc.txt").write_text("1 n02119789 kit_fox\n")
    with pytest.raises(UserError, match=r"each line must hold a synset and its number, as in .*'n02119789'"):
        open_split(tmp_path, "val")


def test_a_missing_batch_is_named(tmp_path):
    for number in (1, 3):
        np.savez(tmp_path / f"train_data_batch_{number}.npz", **batch())
    with pytest.raises(UserError, match="train_data_batch_2 is missing; there are 2 of 3"):
        open_split(tmp_path, "train")
    with pytest.raises(UserError, match="has no batches of val/"):
        Downsampled(tmp_path, "val")


def test_batches_of_different_sizes_are_refused(tmp_path):
    np.savez(tmp_path / "train_data_batch_1.npz", **batch())
    np.savez(tmp_path / "train_data_batch_2.npz", data=np.zeros((2, 3 * 16 * 16), np.uint8), labels=[1, 2])
    with pytest.raises(
        UserError, match=r"batch_2.npz: its images are not of 8 px, as those of train_data_batch_1.npz"
    ):
        open_split(tmp_path, "train")


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def hostile(path: Path) -> dict[str, bytes]:
    """Pickles that create the file `path` if a reader runs their code, each in another way."""
    command = f"touch {path}"
    text = command.encode()
    return {
        "reduce": pickle.dumps({"data": Call(os.system, command)}),
        "eval": pickle.dumps({"data": Call(eval, f"open({str(path)!r}, 'w')")}),
        "exec, protocol 0": pickle.dumps({"data": Call(exec, f"open({str(path)!r}, 'w')")}, protocol=0),
        "inst": b"(S'" + text + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'" + text + b"'\no.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(text)]) + text + b"\x85R.",
        "getattr": pickle.dumps({"data": getattr}),
        "through numpy": b"cnumpy\nload\nS'x'\n\x85R.",
        "a name with dots": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile\x93.",
        "numpy's own loader": b"cnumpy.lib.npyio\nload\n.",
        "import": pickle.dumps(Call(__import__, "antigravity")),
        "extension registry": b"\x82\x01.",
        "persistent id": b"Pos.system\n.",
        "build on what is known": b"cnumpy.core.multiarray\n_reconstruct\n(N}S'__setstate__'\ncos\nsystem\nstb.",
        "array of objects": pickle.dumps(
            {"data": np.array([Call(os.system, command)], dtype=object), "labels": [1]}
        ),
    }


@pytest.mark.parametrize("kind", hostile(Path("x")))
def test_a_hostile_pickle_runs_nothing(kind, tmp_path):
    (tmp_path / "val_data").write_bytes(hostile(tmp_path / "ran")[kind])
    with pytest.raises(UserError, match=r"val_data: (refused, it asks for|cannot be read)") as error:
        read_batch(tmp_path / "val_data")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_the_hostile_pickles_do_run_elsewhere(tmp_path):
    for kind in ("reduce", "eval", "exec, protocol 0", "inst", "obj", "stack global", "array of objects"):
        ran = tmp_path / kind.replace(" ", "")
        pickle.loads(hostile(ran)[kind])
        assert ran.exists(), kind


def test_an_array_whose_dtype_lies_about_objects_is_refused_before_numpy_sees_it(tmp_path):
    """With np.dtype('O') whose flags are cleared, ndarray.__setstate__ would take raw bytes for pointers."""
    dtype = b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\nt"
        + dtype
        + b"I00\nU\x08AAAAAAAAtb"
    )
    (tmp_path / "val_data").write_bytes(b"(dS'data'\n" + array + b"sS'labels'\n(lI1\nas.")
    with pytest.raises(UserError, match="an array of 'O8', not of whole numbers"):
        read_batch(tmp_path / "val_data")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(data=np.zeros((6, 100), np.uint8)),
            r"data is uint8 \(6, 100\), not uint8 rows of 3 \* side \* side",
        ),
        (dict(data=np.zeros((6, 192))), r"(data is float64|an array of 'f8')"),
        (dict(labels=[0, 1, 2, 1, 2, 1]), "not 6 whole numbers from 1"),
        (dict(labels=[1, 2]), r"labels are int64 \(2,\), not 6"),
        (dict(labels=["cat"] * 6), "not 6 whole numbers from 1"),
    ],
)
@pytest.mark.parametrize("kind", ["pickle", "npz"])
def test_a_batch_of_another_form_is_refused(kind, changes, message, tmp_path):
    content = {**batch(), **changes}
    if kind == "pickle":
        (tmp_path / "val_data").write_bytes(pickle.dumps(content))
    else:
        np.savez(tmp_path / "val_data.npz", **content)
    with pytest.raises(UserError, match=message):
        open_split(tmp_path, "val")


@pytest.mark.parametrize("kind", ["pickle", "npz"])
def test_a_cut_batch_is_named(kind, tmp_path):
    path = tmp_path / ("val_data.npz" if kind == "npz" else "val_data")
    if kind == "npz":
        np.savez(path, **batch())
    else:
        path.write_bytes(pickle.dumps(batch()))
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match=f"{path.name}: cannot be read as a batch of downsampled ImageNet"):
        open_split(tmp_path, "val")
