import numpy as np
import pytest
import torch
from PIL import Image

from util.data.folders import class_folders
from util.data.loader import BatchOrder, ImageDataset, find_bad, make_loader
from util.dist import World
from util.errors import UserError
from util.pixels import RGB

ALONE = World()


@pytest.fixture
def folder(tmp_path):
    """Two classes of five images of 10 x 12 pixels, each filled with one grey value."""
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for i in range(5):
            Image.new("L", (10, 12), 20 * i + 100 * (label == "dog")).save(tmp_path / label / f"{i}.png")
    return tmp_path


def test_items_are_uint8_crops_with_label_and_number(folder):
    data = ImageDataset(class_folders(folder), (8, 8), RGB, seed=0)
    values, label, index = data[0, 7]
    assert (values.shape, values.dtype, label, index) == ((3, 8, 8), torch.uint8, 1, 7)
    assert (values == 140).all()
    Image.new("L", (1, 1), 9).save(folder / "cat" / "0.png")  # an image smaller than the crop is enlarged
    assert (data[0, 0][0] == 9).all()


def test_flips_are_a_function_of_seed_epoch_and_image(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(40):
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "a" / f"{i:02d}.png")
    data, again = (ImageDataset(class_folders(tmp_path), (8, 8), RGB, seed=0, flip=True) for _ in range(2))
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


def test_in_order_every_image_comes_once_whatever_the_number_of_processes():
    for size in (1, 2, 3):
        numbers = [
            i
            for rank in range(size)
            for batch in BatchOrder(10, 4, World(rank, size), 0, False)
            for _, i in batch
        ]
        assert sorted(numbers) == list(range(10))


def test_order_can_begin_in_the_middle_and_changes_with_the_epoch():
    order = BatchOrder(20, 4, World(), 0, True)
    first = list(order)
    order.start = 12  # counts images, not batches
    assert list(order) == first[3:]
    halves = [BatchOrder(20, 2, World(rank, 2), 0, True) for rank in range(2)]
    for half in halves:
        half.start = 10  # in the middle of a batch of the single process
    rest = [item for both in zip(*halves, strict=True) for batch in both for item in batch]
    assert rest == [item for batch in first for item in batch][10:18]
    order.start, order.epoch = 0, 1
    assert [i for b in order for _, i in b] != [i for b in first for _, i in b]


def test_where_an_epoch_begins_is_settled_when_it_is_iterated():
    """The engine makes an iterator, then resets `start` for the next epoch, and only then asks for a batch."""
    order = BatchOrder(20, 4, World(), 0, True)
    whole = list(order)
    order.start = 12
    batches = iter(order)
    order.start = 0
    assert list(batches) == whole[3:]


def training_set(folder) -> ImageDataset:
    return ImageDataset(class_folders(folder), (8, 8), RGB, seed=1, flip=True, training=True)


def epoch_of(data, epoch=0, workers=0, world=ALONE, batch_size=4) -> list:
    """The batches of an epoch as lists, and the errors of its bad images."""
    loader = make_loader(
        data, batch_size, world, shuffled=data.training, num_workers=workers, pin_memory=False
    )
    loader.batch_sampler.epoch = epoch
    batches = [
        (values.flatten(1).tolist(), labels.tolist(), indices.tolist()) for values, labels, indices in loader
    ]
    return batches, loader.gather_bad()


def damage(folder, *names) -> None:
    for name in names:
        (folder / name).write_bytes(b"bad")


def test_batches_with_bad_images_do_not_depend_on_workers(folder):
    damage(folder, "cat/1.png", "cat/2.png", "dog/4.png")
    alone, bad = epoch_of(training_set(folder), epoch=3, batch_size=5)
    assert (alone, bad) == epoch_of(training_set(folder), epoch=3, batch_size=5, workers=2)
    assert [line.split(":")[0] for line in bad] == [
        str(folder / name) for name in ("cat/1.png", "cat/2.png", "dog/4.png")
    ]
    order = BatchOrder(10, 5, World(), 1, True)
    order.epoch = 3
    asked = [i for batch in order for _, i in batch]
    stand_in = {1: 3, 2: 3, 9: 0}  # the next readable image; after the last image comes the first
    assert [i for _, _, indices in alone for i in indices] == [stand_in.get(i, i) for i in asked]


def test_two_processes_with_bad_images_see_the_batches_of_one(folder):
    damage(folder, "cat/1.png", "dog/4.png")
    one, _ = epoch_of(training_set(folder), batch_size=4)
    (first, _), (second, _) = (
        epoch_of(training_set(folder), world=World(rank, 2), batch_size=2) for rank in (0, 1)
    )
    assert [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(first, second, strict=True)] == [
        list(b) for b in one
    ]


def test_a_bad_image_is_reported_once(folder):
    damage(folder, "cat/1.png")
    loader = make_loader(training_set(folder), 5, World(), shuffled=True, num_workers=0, pin_memory=False)
    list(loader)
    assert len(loader.gather_bad()) == 1
    damage(folder, "dog/0.png")
    loader.batch_sampler.epoch = 1
    list(loader)
    assert [line.split(":")[0] for line in loader.gather_bad()] == [str(folder / "dog" / "0.png")]
    assert loader.known_bad == {1, 5}


@pytest.mark.parametrize("workers", [0, 2])
def test_in_validation_a_bad_image_is_left_out_even_where_a_batch_is_all_bad(folder, workers):
    damage(folder, *(f"cat/{i}.png" for i in (0, 1, 2, 4)))
    batches, bad = epoch_of(
        ImageDataset(class_folders(folder), (8, 8), RGB, seed=0), batch_size=3, workers=workers
    )
    assert [indices for _, _, indices in batches] == [[3, 5], [6, 7, 8], [9]]
    assert len(bad) == 4


def test_nothing_but_bad_images_is_an_error(folder):
    damage(folder, *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(5)))
    with pytest.raises(UserError, match=r"png: cannot be read .*\(and the 9 images after it are bad too\)"):
        epoch_of(training_set(folder))


def test_find_bad_reads_all_in_parallel(folder, capsys):
    data = ImageDataset(class_folders(folder), (8, 8), RGB, seed=0)
    assert find_bad(data, World(), 2) == []
    damage(folder, "dog/1.png", "cat/4.png")
    paths = data.source.paths
    assert [line.split(":")[0] for line in find_bad(data, World(), 2)] == [paths[4], paths[6]]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_same_batches_with_any_number_of_workers(folder, workers):
    data = ImageDataset(class_folders(folder), (8, 8), RGB, seed=1, flip=True)
    loader = make_loader(data, 4, World(), shuffled=True, num_workers=workers, pin_memory=False)
    indices = [index.tolist() for _, _, index in loader]
    assert indices == [[i for _, i in batch] for batch in BatchOrder(10, 4, World(), 1, True)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder; --data_path must hold images"),
        (lambda path: path.mkdir(), "there is no image in it"),
        (lambda path: (path / "cat").mkdir(parents=True), "there is no image in it"),
    ],
)
def test_a_folder_without_images_is_an_error(tmp_path, make, message):
    make(tmp_path / "train")
    with pytest.raises(UserError, match=message):
        class_folders(tmp_path / "train")


def test_a_batch_larger_than_the_data_is_an_error(folder):
    data = ImageDataset(class_folders(folder), (8, 8), RGB, seed=0)
    with pytest.raises(UserError, match=r"batch_size 6 on 2 process\(es\) is more than the 10"):
        make_loader(data, 6, World(0, 2), shuffled=True, num_workers=0, pin_memory=False)
