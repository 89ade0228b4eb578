"""Which images are measured; the statistics of blocks of images add up to those of all images."""

import hashlib

import numpy as np
import pytest
import torch

from conftest import random_values, save_image
from evaluation import features
from util.crop import center_crop_arr
from util.dist import World
from util.errors import UserError


class Sums:
    """Stands for the Inception network. Two features of an image: the sums of its top row and of its left column."""

    about = {"weights_sha256": "0"}  # noqa: RUF012

    def __call__(self, values):
        pool = torch.stack([values[:, :, 0].float().sum((1, 2)), values[:, :, :, 0].float().sum((1, 2))], 1)
        return pool, -pool


def measure(path, size=None, split=None, keep=None, num_workers=0):
    return features.Measurer(Sums(), World(), size, num_workers).measure(path, split, keep)


@pytest.fixture
def folder(tmp_path):
    for i, values in enumerate(random_values(9, 8)):
        save_image(tmp_path / "images" / f"{i:02d}.png", values)
    return tmp_path / "images"


def test_a_folder_and_an_npz_of_the_same_images_measure_the_same(folder, tmp_path):
    values = random_values(9, 8)
    np.savez(tmp_path / "a.npz", arr_0=values.permute(0, 2, 3, 1).numpy())
    for num_workers in (0, 2):
        a, b = measure(folder, num_workers=num_workers), measure(tmp_path / "a.npz", num_workers=num_workers)
        assert torch.equal(a.features, Sums()(values)[0])
        assert torch.equal(a.features, b.features)
        assert a.about["pictures_sha256"] == b.about["pictures_sha256"]
    with pytest.raises(UserError, match="these npz images of 8 x 8 px are not of 16 px"):
        measure(tmp_path / "a.npz", size=16)
    digests = b"".join(hashlib.sha256(image.numpy().tobytes()).digest() for image in values)
    assert a.about == {
        "path": str(folder),
        "kind": "images without classes",
        "pictures": 9,
        "crop": None,
        "pictures_sha256": hashlib.sha256(digests).hexdigest(),
    }


def test_images_are_cropped_as_for_training_or_must_be_of_one_size(folder):
    save_image(folder / "sub" / "wide.png", random_values(1, 24, seed=1)[0][:, :18])
    with pytest.raises(
        UserError, match=r"/sub/wide\.png: 24 x 18 px, the first has 8 x 8; give --img_size to crop all"
    ):
        measure(folder)
    found = measure(folder, size=8)
    assert found.about["crop"] == "ADM, 8 px"
    last = features.open_images(folder)
    cropped = torch.from_numpy(np.array(center_crop_arr(last.image(9), 8))).permute(2, 0, 1)
    assert torch.equal(found.features[9:], Sums()(cropped[None])[0])


def test_a_split_of_a_data_set_is_measured(folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "val").symlink_to(folder)
    (tmp_path / "data" / "train").symlink_to(folder)
    assert measure(tmp_path / "data", split="val").about["pictures"] == 9


def test_blocks_add_up_to_the_whole(folder, monkeypatch):
    whole = measure(folder, keep=4)
    monkeypatch.setattr(features, "BATCH", 2)
    monkeypatch.setattr(features, "BLOCK", 4)  # 4 + 4 + 1
    parts = measure(folder, keep=4)
    np.testing.assert_allclose(parts.mu, whole.mu, rtol=1e-6)
    np.testing.assert_allclose(parts.sigma, whole.sigma, rtol=1e-5)
    np.testing.assert_allclose(
        whole.sigma, np.cov(measure(folder).features.double().numpy(), rowvar=False), rtol=1e-12
    )
    assert parts.about == whole.about
    assert torch.equal(parts.features, whole.features)
    every = measure(folder)
    assert len(whole.features) == len(whole.logits) == 4
    assert all((every.features == row).all(1).any() for row in whole.features)


def test_images_that_cannot_be_measured_are_named(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((3, 8, 8, 3)))
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    for path, message in (
        (tmp_path / "empty", "there is no image in it"),
        (tmp_path / "float.npz", r"must be arr_0, uint8 \(N, H, W, 3\), but arr_0 is float64 \(3, 8, 8, 3\)"),
        (tmp_path / "other.npz", "but arr_0 is missing"),
    ):
        with pytest.raises(UserError, match=message):
            measure(path)
    for path in sorted(folder.glob("*.png"))[1:]:
        path.unlink()
    with pytest.raises(UserError, match=r"00\.png: a score needs at least 2 images"):
        measure(folder)
    (folder / "01.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"01\.png: cannot be read as an image"):
        measure(folder)


def test_arrays_of_rgb_values_can_be_measured_and_others_are_refused(folder, tmp_path):
    values = random_values(9, 8).permute(0, 2, 3, 1).numpy()
    np.save(tmp_path / "val.npy", values)
    np.save(tmp_path / "train.npy", values)
    assert torch.equal(measure(tmp_path, size=8, split="val").features, measure(folder).features)
    np.save(tmp_path / "val.npy", values[..., 0])
    with pytest.raises(UserError, match=r"val.npy: each row is of shape \(8, 8\), but a model of 8 px needs"):
        measure(tmp_path, size=8, split="val")
