import io
import sys

import pytest
import torch
from PIL import Image

from conftest import random_values, save_image, score, train_tiny
from util.data.loader import ImageDataset, open_split
from util.errors import UserError
from util.pixels import RGB

datasets = pytest.importorskip("datasets", reason="needs the extra [hf]")
NAMES = ["cat", "dog", "emu"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(seed: int, n: int = 6, labels=True, bad=()):
    """Random 8 px images with class labels, in the columns of a data set from the hub."""
    rows = []
    for i, values in enumerate(random_values(n, 8, seed)):
        buffer = io.BytesIO()
        Image.fromarray(values.permute(1, 2, 0).numpy()).save(buffer, "png")
        rows.append({"bytes": b"damaged" if i in bad else buffer.getvalue(), "path": None})
    columns, types = {"image": rows}, {"image": datasets.Image()}
    if labels:
        columns["label"], types["label"] = [i % 3 for i in range(n)], datasets.ClassLabel(names=NAMES)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(types))


def read(source) -> torch.Tensor:
    data = ImageDataset(source, (8, 8), RGB, seed=0)
    return torch.stack([data[0, i][0] for i in range(len(data))])


def write_parquet(folder, **more) -> None:
    (folder / "data").mkdir(parents=True)
    table(0, **more).select(range(4)).to_parquet(folder / "data" / "train-00000-of-00002.parquet")
    table(0, **more).select(range(4, 6)).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    table(1, **more).to_parquet(folder / "data" / "validation-00000-of-00001.parquet")


def test_parquet_files_as_the_hub_has_them(tmp_path):
    write_parquet(tmp_path)
    train, val = (open_split(tmp_path, split) for split in ("train", "val"))
    assert (read(train) == random_values(6, 8, 0)).all()
    assert (read(val) == random_values(6, 8, 1)).all()
    assert train.classes == val.classes == NAMES
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    log = train_tiny(tmp_path, tmp_path / "out")
    assert (
        "Hugging Face data set, train and Hugging Face data set, validation, 3 classes, 6 + 6 images"
        in log[0]["note"]
    )
    assert score(log, "val/num_images") == 6


def test_what_save_to_disk_wrote_and_images_that_cannot_be_read(tmp_path):
    datasets.DatasetDict(train=table(0, bad=[2]), test=table(1, bad=[5])).save_to_disk(tmp_path / "saved")
    assert open_split(tmp_path / "saved", "val").kind == "Hugging Face data set, test"
    log = train_tiny(tmp_path / "saved", tmp_path / "out")
    train, val = [note for record in log if "skipped: " in (note := record.get("note", ""))]
    assert "bad image 1, skipped: " in train
    assert "saved, train, row 2: cannot be read as an image (not an image)" in train
    assert "saved, test, row 5: cannot be read" in val
    assert score(log, "val/num_images") == 5


def test_a_data_set_without_labels_is_without_classes(tmp_path):
    write_parquet(tmp_path, labels=False)
    source = open_split(tmp_path, "train")
    assert (source.classes, source.labels.tolist()) == ([], [0] * 6)


def test_a_stray_table_beside_class_folders_does_not_hide_them(tmp_path):
    for i, values in enumerate(random_values(2, 8)):
        save_image(tmp_path / "train" / "cat" / f"{i}.png", values)
    table(0).to_parquet(tmp_path / "notes.parquet")
    assert open_split(tmp_path, "train").kind.startswith("class folders")


def test_labels_that_are_words_or_bare_numbers(tmp_path):
    for name, labels, classes in (
        ("words", ["b", "a", "c"], ["a", "b", "c"]),
        ("numbers", [1, 0, 2], ["0", "1", "2"]),
    ):
        plain = table(0, n=3, labels=False).add_column("label", labels)
        datasets.DatasetDict(train=plain).save_to_disk(tmp_path / name)
        source = open_split(tmp_path / name, "train")
        assert (source.classes, source.labels.tolist()) == (classes, [1, 0, 2])


def test_parquet_that_another_program_wrote(tmp_path):
    """Such a file lacks Hugging Face's metadata on the types of its columns."""
    from pyarrow import parquet

    plain = table(0).data.table.replace_schema_metadata(None)
    parquet.write_table(plain, tmp_path / "train.parquet")
    source = open_split(tmp_path, "train")
    assert (read(source) == random_values(6, 8, 0)).all()
    assert (source.classes, source.labels.tolist()) == (["0", "1", "2"], [0, 1, 2, 0, 1, 2])


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    datasets.DatasetDict(train=table(0)).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        UserError, match="with the splits train; it needs one of validation, val, valid, test"
    ):
        open_split(tmp_path / "saved", "val")
    datasets.DatasetDict(train=table(0).remove_columns("image")).save_to_disk(tmp_path / "blind")
    with pytest.raises(UserError, match="train has no column of images, only label"):
        open_split(tmp_path / "blind", "train")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"cut: cannot be read as a Hugging Face data set"):
        open_split(tmp_path / "cut", "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'fractalgen\[hf\]'"):
        open_split(tmp_path / "saved", "train")
