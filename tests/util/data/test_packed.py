import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import random_values, train_tiny
from util import checkpoint
from util.data import tool
from util.data.loader import ImageDataset, open_split
from util.errors import UserError
from util.pixels import RGB, Alphabet


@pytest.fixture
def folder(tmp_path):
    """12 training and 6 validation JPEGs of 20 x 30 pixels in 3 classes. Number 7 and number 3 are bad."""
    for split, n in (("train", 12), ("val", 6)):
        for i, values in enumerate(random_values(n, 10, seed=n)):
            path = tmp_path / "files" / split / "abc"[i % 3] / f"{i:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.permute(1, 2, 0).numpy()).resize((20, 30)).save(path, quality=95)
        bad = tmp_path / "files" / split / "b" / ("10.jpg" if split == "train" else "04.jpg")
        bad.write_bytes(bad.read_bytes()[:200])
    return tmp_path / "files"


def pack(data, out, *flags) -> None:
    assert tool.main(["pack", str(data), str(out), "--img_size", "8", "--num_workers", "0", *flags]) == 0


def test_training_from_a_pack_equals_training_from_the_files_to_the_bit(folder, tmp_path):
    """This holds for flips too, and with a bad image in training and in validation."""
    pack(folder, tmp_path / "pack")
    ends, logs = [], []
    for data in (folder, tmp_path / "pack"):
        out = tmp_path / f"out-{data.name}"
        logs.append(train_tiny(data, out, "--epochs 2 --eval_freq 1"))
        ends.append(checkpoint.load(out / "checkpoint-last.pth")["model"])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    of_the_machine = ("per_s", "memory_gib")
    figures = [
        [{k: v for k, v in record.items() if not k.endswith(of_the_machine)} for record in log[1:]]
        for log in ([one for one in log if "CPU threads" not in one.get("note", "")] for log in logs)
    ]
    assert figures[0] == figures[1]
    assert sum("bad image" in record.get("note", "") for record in figures[0]) == 2


def test_a_pack_holds_the_crops_labels_names_and_classes(folder, tmp_path):
    pack(folder, tmp_path / "pack")
    packed, files = (
        ImageDataset(open_split(root, "train"), (8, 8), RGB, seed=0, flip=True)
        for root in (tmp_path / "pack", folder)
    )
    assert packed.classes == files.classes == ["a", "b", "c"]
    assert [packed.source.name(i) for i in range(12)] == files.source.paths
    for i in (*range(7), *range(8, 12)):
        for epoch in (0, 1):
            (values, *rest), (expected, *expected_rest) = packed[epoch, i], files[epoch, i]
            assert torch.equal(values, expected)
            assert rest == expected_rest
    for data in (packed, files):
        with pytest.raises(UserError, match=r"files/train/b/10.jpg: cannot be read as an image"):
            data[0, 7]
    packed = ImageDataset(open_split(tmp_path / "pack", "train"), (8, 8), RGB, seed=0)
    assert len(pickle.dumps(packed)) < 3000, "a worker is handed the place of the images, not the images"


def test_a_pack_of_another_size_is_refused(folder, tmp_path):
    pack(folder, tmp_path / "pack", "--splits", "train")
    source = open_split(tmp_path / "pack", "train")
    with pytest.raises(
        UserError, match="packed images of 8 px do not fit a model of 32 px; pack them with --img_size 32"
    ):
        ImageDataset(source, (32, 32), RGB, seed=0)


def test_a_pack_of_rectangles_and_another_alphabet_says_what_it_is(folder, tmp_path, capsys):
    grey = [
        "--img_size",
        "6x8",
        "--channels",
        "1",
        "--num_values",
        "5",
        "--splits",
        "train",
        "--num_workers",
        "0",
    ]
    assert tool.main(["pack", str(folder), str(tmp_path / "pack"), *grey]) == 0
    assert "12 images of 6x8 px, 1 channel of 5 ordinal values, 1 bad" in capsys.readouterr().out
    alphabet = Alphabet(1, 5)
    packed, files = (
        ImageDataset(open_split(root, "train"), (6, 8), alphabet, seed=0, flip=True)
        for root in (tmp_path / "pack", folder)
    )
    for i in (*range(7), *range(8, 12)):
        assert torch.equal(packed[1, i][0], files[1, i][0])
    assert packed.augment.flip
    manifest = json.loads((tmp_path / "pack/train/pack.json").read_text())
    assert (manifest["shape"], manifest["alphabet"]) == ([6, 8], [1, 5, "ordinal"])
    with pytest.raises(
        UserError,
        match=r"these packed images of 6x8 px, 1 channel of 5 ordinal values do not fit a model of 8 px; pack them with --img_size 8$",
    ):
        ImageDataset(packed.source, (8, 8), RGB, seed=0)
    with pytest.raises(
        UserError, match=r"with --img_size 6x8 --channels 1 --num_values 17 --value_kind ordinal$"
    ):
        ImageDataset(packed.source, (6, 8), Alphabet(1, 17), seed=0)
    ImageDataset(
        packed.source, (6, 8), Alphabet(1, 5, mean=[0.1], std=[1]), seed=0
    )  # a pack holds no normalised values


def test_a_pack_of_an_earlier_version_is_one_of_rgb_squares(folder, tmp_path):
    pack(folder, tmp_path / "pack", "--splits", "train")
    manifest = tmp_path / "pack/train/pack.json"
    note = json.loads(manifest.read_text())
    for name in ("shape", "alphabet", "can_mirror"):
        del note[name]
    manifest.write_text(json.dumps({"img_size": 8, **note}))
    source = open_split(tmp_path / "pack", "train")
    assert (source.shape, source.alphabet, source.can_mirror) == ((8, 8), RGB, True)
    assert len(ImageDataset(source, (8, 8), RGB, seed=0)) == 12
    pack(folder, tmp_path / "pack", "--splits", "train")  # is left as it is
    assert json.loads(manifest.read_text())["img_size"] == 8


def damage_manifest(folder):
    note = json.loads((folder / "pack.json").read_text())
    (folder / "pack.json").write_text(json.dumps({**note, "shape": [16, 16]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "pack.json").unlink(),
            "packing was interrupted; run the same dataset_tool pack command",
        ),
        (lambda folder: (folder / "pictures.npy").unlink(), "the pack is damaged"),
        (
            lambda folder: (folder / "pictures.npy").write_bytes((folder / "pictures.npy").read_bytes()[:-1]),
            "the pack is damaged",
        ),
        (
            lambda folder: np.save(folder / "labels.npy", np.array([print], dtype=object)),
            "the pack is damaged",
        ),
        (
            damage_manifest,
            r"the pack is damaged \(pictures.npy is uint8 \(12, 3, 8, 8\), not uint8 \(12, 3, 16, 16\)\)",
        ),
    ],
)
def test_an_unfinished_or_damaged_pack_is_refused(damage, message, folder, tmp_path):
    pack(folder, tmp_path / "pack", "--splits", "train")
    damage(tmp_path / "pack" / "train")
    with pytest.raises(UserError, match=message):
        open_split(tmp_path / "pack", "train")
