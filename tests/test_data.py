import numpy as np
import pytest
import torch
from PIL import Image

from util.data import BatchOrder, PictureFolder, make_loader
from util.dist import World
from util.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Two classes of five 10 x 12 pictures, each of one grey."""
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for i in range(5):
            Image.new("L", (10, 12), 20 * i + 100 * (label == "dog")).save(tmp_path / label / f"{i}.png")
    return tmp_path


def test_items_are_uint8_crops_with_label_and_number(folder):
    data = PictureFolder(folder, 8, flip=False, seed=0)
    levels, label, index = data[0, 7]
    assert (levels.shape, levels.dtype, label, index) == ((3, 8, 8), torch.uint8, 1, 7)
    assert (levels == 140).all()
    Image.new("L", (1, 1), 9).save(folder / "cat" / "0.png")  # tiny pictures are enlarged
    assert (data[0, 0][0] == 9).all()


def test_flips_are_a_function_of_seed_epoch_and_picture(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(40):
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "a" / f"{i:02d}.png")
    data, again = (PictureFolder(tmp_path, 8, flip=True, seed=0) for _ in range(2))
    turned = {epoch: [data[epoch, i][0][0, 0, 0].item() == 7 for i in range(40)] for epoch in (0, 1)}
    assert turned[0] != turned[1]
    assert 8 < sum(turned[0]) < 32
    assert turned[1] == [again[1, i][0][0, 0, 0].item() == 7 for i in range(40)]


def test_two_processes_together_see_the_batches_of_one():
    def order(size: int, batch: int, rank: int) -> list:
        batches = BatchOrder(21, batch, World(rank, size), seed=3, shuffled=True)
        batches.epoch = 2
        return list(batches)

    alone = order(1, 8, 0)
    both = [a + b for a, b in zip(order(2, 4, 0), order(2, 4, 1), strict=True)]
    assert alone == both
    assert len(alone) == 2
    numbers = [index for batch in alone for _, index in batch]
    assert len(set(numbers)) == 16
    assert {epoch for batch in alone for epoch, _ in batch} == {2}


def test_in_order_every_picture_comes_once_whatever_the_number_of_processes():
    for size in (1, 2, 3):
        numbers = [i for rank in range(size) for batch in BatchOrder(10, 4, World(rank, size), 0, False) for _, i in batch]
        assert sorted(numbers) == list(range(10))


def test_order_can_begin_in_the_middle_and_changes_with_the_epoch():
    order = BatchOrder(20, 4, World(), 0, True)
    first = list(order)
    order.start = 3
    assert list(order) == first[3:]
    order.start, order.epoch = 0, 1
    assert [i for b in order for _, i in b] != [i for b in first for _, i in b]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_same_batches_with_any_number_of_workers(folder, workers):
    data = PictureFolder(folder, 8, flip=True, seed=1)
    loader = make_loader(data, 4, World(), shuffled=True, num_workers=workers, pin_memory=False)
    indices = [index.tolist() for _, _, index in loader]
    assert indices == [[i for _, i in batch] for batch in BatchOrder(10, 4, World(), 1, True)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder; --data_path must hold train/ and val/"),
        (lambda path: path.mkdir(), "there is no picture in it"),
        (lambda path: (path / "cat").mkdir(parents=True), "there is no picture in it"),
    ],
)
def test_a_folder_without_pictures_is_an_error(tmp_path, make, message):
    make(tmp_path / "train")
    with pytest.raises(UserError, match=message):
        PictureFolder(tmp_path / "train", 8, flip=False, seed=0)


def test_a_batch_larger_than_the_data_is_an_error(folder):
    data = PictureFolder(folder, 8, flip=False, seed=0)
    with pytest.raises(UserError, match=r"batch_size 6 on 2 process\(es\) is more than the 10"):
        make_loader(data, 6, World(0, 2), shuffled=True, num_workers=0, pin_memory=False)
