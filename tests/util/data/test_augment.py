import numpy as np
import pytest
import torch
from PIL import Image

from conftest import random_values, save_image
from util.data.augment import Augmentation
from util.data.loader import open_dataset
from util.dist import World
from util.errors import UserError
from util.pixels import RGB

SIZE = 8


def moved(values: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """The image moved with its edges repeated, written pixel by pixel."""
    inside = lambda place: min(max(place, 0), SIZE - 1)  # noqa: E731
    rows = [[values[:, inside(y - down), inside(x - right)] for x in range(SIZE)] for y in range(SIZE)]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def test_shifts_take_every_distance_and_repeat_the_edge():
    values = random_values(1, SIZE)[0]
    every = {(y, x): moved(values, y, x) for y in range(-2, 3) for x in range(-2, 3)}
    augment, met = Augmentation(shift=2), set()
    for index in range(400):
        shifted = augment(values, 3, 0, index)
        found = [place for place, image in every.items() if torch.equal(image, shifted)]
        assert len(found) == 1
        met.update(found)
    assert met == every.keys()


def test_shifts_are_a_function_of_seed_epoch_and_image_and_leave_the_flips_as_they_are():
    values = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    values[0, :, SIZE // 2 :] = 255  # red on the right
    shifted = lambda seed, epoch: [Augmentation(True, 2)(values, seed, epoch, i) for i in range(40)]  # noqa: E731
    first = shifted(0, 0)
    assert all(map(torch.equal, first, shifted(0, 0)))
    assert not all(map(torch.equal, first, shifted(0, 1)))
    assert not all(map(torch.equal, first, shifted(1, 0)))
    turned = [bool(image[0, 0, 0]) for image in first]
    assert turned == [bool(Augmentation(True)(values, 0, 0, i)[0, 0, 0]) for i in range(40)]


@pytest.mark.parametrize("packed", [False, True])
def test_only_training_images_are_changed_whatever_their_source(tmp_path, packed):
    from util.data.tool import main as tool

    for split in ("train", "val"):
        for i, values in enumerate(random_values(6, SIZE)):
            save_image(tmp_path / "files" / split / "cat" / f"{i}.png", values)
    root = tmp_path / "files"
    if packed:
        root = tmp_path / "packs"
        tool(["pack", str(tmp_path / "files"), str(root), "--img_size", str(SIZE), "--num_workers", "0"])
    how = dict(class_num=1, seed=0, strict=False, world=World(), num_workers=0)
    changed, plain = (
        {
            split: open_dataset(root, split, (SIZE, SIZE), RGB, flip=flip, shift=shift, **how)
            for split in ("train", "val")
        }
        for flip, shift in ((True, 3), (False, 0))
    )
    images = lambda data: torch.stack([data[0, i][0] for i in range(len(data))])  # noqa: E731
    assert torch.equal(images(changed["val"]), images(plain["val"]))
    assert not torch.equal(images(changed["train"]), images(plain["train"]))
    expected = [Augmentation(True, 3)(values, 0, 0, i) for i, values in enumerate(images(plain["train"]))]
    assert torch.equal(images(changed["train"]), torch.stack(expected))
    assert np.array_equal(
        Image.open(tmp_path / "files/train/cat/0.png"), images(plain["train"])[0].permute(1, 2, 0)
    )


def test_a_shift_that_leaves_too_little_of_the_image_is_refused():
    Augmentation(shift=4).check((SIZE, 12))
    with pytest.raises(UserError, match="--shift 5 must be from 0 to 4, half of 8 pixels"):
        Augmentation(shift=5).check((12, SIZE))
