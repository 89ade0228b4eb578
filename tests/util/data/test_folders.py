import shutil

import pytest
import torch
from torchvision.datasets import ImageFolder

from conftest import random_values, save_image, score, train_tiny
from util.data.folders import HELD_OUT, LABEL_LISTS, class_folders
from util.data.loader import ImageDataset, open_split
from util.errors import UserError
from util.pixels import RGB

WNIDS = ("n01443537", "n01629819", "n02124075")


def fill(folder, names, seed=0) -> torch.Tensor:
    """Writes random 8 px images to folder/name. Returns their values."""
    values = random_values(len(names), 8, seed)
    for name, image in zip(names, values, strict=True):
        save_image(folder / name, image)
    return values


def read(source) -> torch.Tensor:
    data = ImageDataset(source, (8, 8), RGB, seed=0)
    return torch.stack([data[0, i][0] for i in range(len(data))])


@pytest.fixture
def imagenet(tmp_path):
    """A train/ with three classes of two images, and a flat val/ with five images without labels."""
    fill(tmp_path / "train", [f"{wnid}/{wnid}_{i}.png" for wnid in WNIDS for i in range(2)])
    fill(tmp_path / "val", [f"ILSVRC2012_val_0000000{i}.png" for i in range(1, 6)], seed=1)
    return tmp_path


def test_class_folders_are_listed_in_torchvisions_order_without_hidden_ones(tmp_path):
    fill(tmp_path, ["b/2.png", "b/deep/1.png", "b/1.png", "a/x.PNG", "a/Z.png", "c/0.webp"])
    theirs = ImageFolder(str(tmp_path))
    fill(tmp_path, [".ipynb_checkpoints/1.png", "a/._x.PNG"])
    (tmp_path / "a" / "notes.txt").write_text("no image")
    ours = class_folders(tmp_path)
    assert list(zip(ours.paths, ours.labels.tolist(), strict=True)) == theirs.samples
    assert ours.classes == theirs.classes == ["a", "b", "c"]


def test_a_class_folder_without_an_image_is_an_error(tmp_path):
    fill(tmp_path / "train", ["cat/0.png"])
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(UserError, match=r"train: no image in 1 of its class folders \(dog\)"):
        open_split(tmp_path, "train")


LISTS = {
    "val_annotations.txt": "".join(
        f"ILSVRC2012_val_0000000{i}.png\t{WNIDS[i % 3]}\t0\t32\t44\t62\n" for i in range(1, 6)
    ),
    "LOC_val_solution.csv": "ImageId,PredictionString\n"
    + "".join(
        f"ILSVRC2012_val_0000000{i},{WNIDS[i % 3]} 85 1 499 272 {WNIDS[i % 3]} 5 4 3 2\n"
        for i in (3, 1, 2, 5, 4)
    ),
    "imagenet_2012_validation_synset_labels.txt": "".join(f"{WNIDS[i % 3]}\n" for i in range(1, 6)),
    "val.txt": "".join(f"ILSVRC2012_val_0000000{i}.png {i % 3}\n" for i in range(1, 6)),
}


@pytest.mark.parametrize("name", LABEL_LISTS)
@pytest.mark.parametrize("place", ["", "val"])
def test_a_flat_val_is_labelled_by_any_of_the_usual_lists(name, place, imagenet):
    (imagenet / place / name).write_text(LISTS[name])
    val = open_split(imagenet, "val")
    assert (read(val) == random_values(5, 8, seed=1)).all()
    assert val.labels.tolist() == [1, 2, 0, 1, 2]
    assert val.classes == open_split(imagenet, "train").classes == list(WNIDS)
    assert name in val.kind


def test_a_flat_val_without_train_takes_its_classes_from_the_list(imagenet):
    shutil.rmtree(imagenet / "train")
    for name, classes in (("val_annotations.txt", list(WNIDS)), ("val.txt", ["0", "1", "2"])):
        (imagenet / name).write_text(LISTS[name])
        assert open_split(imagenet, "val").classes == classes
        (imagenet / name).unlink()


def test_what_a_flat_val_lacks_is_named(imagenet):
    with pytest.raises(
        UserError,
        match=r"val: its 5 images are in no class folders.* put one of val_annotations.txt, LOC_val",
    ):
        open_split(imagenet, "val")
    wrong = {
        "imagenet_2012_validation_synset_labels.txt": ("n01443537\n" * 4, "has 4 lines for 5 images"),
        "val.txt": (
            "ILSVRC2012_val_00000001.png 0\n",
            "no line for 4 of 5 images, the first is .*val_00000002.png",
        ),
        "val_annotations.txt": (
            LISTS["val_annotations.txt"].replace(WNIDS[0], "n99"),
            "'n99' is none of the 3 classes",
        ),
    }
    for name, (content, message) in wrong.items():
        (imagenet / name).write_text(content)
        with pytest.raises(UserError, match=f"{name}: .*{message}"):
            open_split(imagenet, "val")
        (imagenet / name).unlink()


def test_tiny_imagenet_as_it_unpacks(tmp_path):
    train = fill(tmp_path / "train", [f"{wnid}/images/{wnid}_{i}.png" for wnid in WNIDS for i in range(2)])
    val = fill(tmp_path / "val" / "images", [f"val_{i}.png" for i in range(12)], seed=1)
    for wnid in WNIDS:
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
    (tmp_path / "wnids.txt").write_text("\n".join(reversed(WNIDS)))
    (tmp_path / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{i}.png\t{WNIDS[i % 3]}\t0\t32\t44\t62\n" for i in range(12))
    )
    (tmp_path / "test" / "images").mkdir(parents=True)
    assert (read(open_split(tmp_path, "train")) == train).all()
    source = open_split(tmp_path, "val")
    numbers = [int(path.split("_")[-1].removesuffix(".png")) for path in source.paths]
    assert source.labels.tolist() == [number % 3 for number in numbers]
    assert (read(source) == val[numbers]).all()
    log = train_tiny(tmp_path, tmp_path / "out")
    assert (
        log[0]["note"]
        == f"{tmp_path}: class folders and a flat val/ with val_annotations.txt, 3 classes, 6 + 12 images"
    )
    assert score(log, "val/num_images") == 12


def test_images_without_classes_train_an_unconditional_model(tmp_path):
    fill(tmp_path / "train", [f"{i}.png" for i in range(4)])
    fill(tmp_path / "val", [f"{i}.png" for i in range(2)])
    log = train_tiny(tmp_path, tmp_path / "out", "--class_num 0")
    assert log[0]["note"] == f"{tmp_path}: images without classes, 0 classes, 4 + 2 images"
    assert score(log, "val/num_images") == 2


def test_a_folder_of_nothing_but_images_holds_some_out(tmp_path):
    names = [f"{i:02d}.png" for i in range(HELD_OUT + 5)] + ["more/a.gif"]
    fill(tmp_path, names)
    train, val = (open_split(tmp_path, split) for split in ("train", "val"))
    assert val.paths == [str(tmp_path / "00.png"), str(tmp_path / f"{HELD_OUT}.png")]
    assert sorted(train.paths + val.paths) == [str(tmp_path / name) for name in names]
    assert train.classes == val.classes == []


def test_class_folders_alone_hold_out_images_of_each_class(tmp_path):
    names = [f"{name}/{i:02d}.png" for name, n in (("a", HELD_OUT + 1), ("b", 3), ("c", 1)) for i in range(n)]
    fill(tmp_path, names)
    train, val = (open_split(tmp_path, split) for split in ("train", "val"))
    assert val.paths == [str(tmp_path / name) for name in ("a/00.png", f"a/{HELD_OUT}.png", "b/00.png")]
    assert val.labels.tolist() == [0, 0, 1]
    assert sorted(train.paths + val.paths) == [str(tmp_path / name) for name in names]
    assert train.labels.tolist() == [0] * (HELD_OUT - 1) + [1, 1, 2]
    assert train.classes == val.classes == ["a", "b", "c"]
    assert train.kind == f"class folders, every {HELD_OUT}th for validation"


def test_train_without_val_holds_out_too(tmp_path):
    fill(tmp_path / "train", [f"a/{i}.png" for i in range(4)])
    assert [len(open_split(tmp_path, split)) for split in ("train", "val")] == [3, 1]


def test_one_image_cannot_be_held_out(tmp_path):
    fill(tmp_path, ["a/0.png", "b/0.png"])
    with pytest.raises(UserError, match=r"a/0.png: too few images to hold one out; give at least two of a"):
        open_split(tmp_path, "val")
