"""References: ADM's batches, mu and sigma, our own; and the messages for one that does not fit."""

import json

import numpy as np
import pytest
import torch

from conftest import random_values, save_image
from evaluation.features import EFFICIENTNET, INCEPTION, Measurer, gaussian
from evaluation.reference import make_reference, open_reference, where_from
from util.dist import World
from util.errors import UserError

DIM = INCEPTION.dim


class FirstValues:
    """Stands for the Inception network. The features of an image are its first 2048 values."""

    about = {"name": "stand-in", "weights_sha256": "abc"}  # noqa: RUF012

    def __call__(self, values):
        pool = values.flatten(1)[:, :DIM].float()
        return pool, pool[:, :5]


def measurer(size=None) -> Measurer:
    return Measurer(FirstValues(), World(), size)


def open_it(path, size=None):
    return open_reference(path, measurer(size))


@pytest.fixture
def images(tmp_path):
    for i, values in enumerate(random_values(5, 32)):
        save_image(tmp_path / "images" / f"{i}.png", values)
    return tmp_path / "images"


def test_adms_batch_gives_statistics_of_its_training_set_and_features_of_its_images(tmp_path):
    mu, sigma = np.arange(DIM, dtype=np.float32), np.eye(DIM)
    values = random_values(3, 32)
    arrays = dict(
        arr_0=values.permute(0, 2, 3, 1).numpy(), mu=mu, sigma=sigma, mu_s=np.zeros(4), sigma_s=np.eye(4)
    )
    np.savez(tmp_path / "VIRTUAL.npz", **arrays)
    found = open_it(tmp_path / "VIRTUAL.npz")
    assert found.mu.dtype == found.sigma.dtype == np.float64
    assert np.array_equal(found.mu, mu)
    assert np.array_equal(found.sigma, sigma)
    assert torch.equal(found.features, FirstValues()(values)[0])
    assert (found.about["pictures"], found.about["fid_against"]) == (3, "mu and sigma of the file")
    assert len(found.about["sha256"]) == 64
    np.savez(tmp_path / "images.npz", arr_0=arrays["arr_0"])
    only = open_it(tmp_path / "images.npz")
    assert np.array_equal(only.mu, gaussian(found.features)[0])
    assert only.about["fid_against"] == "these images"


def test_mu_and_sigma_alone_have_no_features(tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(DIM), sigma=np.eye(DIM, dtype=np.float32))
    assert open_it(tmp_path / "stats.npz").features is None


def test_a_reference_that_we_make_equals_measuring_its_images(images, tmp_path):
    out = tmp_path / "made.npz"
    note = make_reference(images, out, measurer(28))
    made, direct = open_it(out), open_it(images, size=28)
    assert np.array_equal(made.mu, direct.mu)
    assert np.array_equal(made.sigma, direct.sigma)
    assert torch.equal(made.features, direct.features)
    assert note == json.loads((tmp_path / "made.json").read_text()) == made.about["made"]
    assert note["extractor"]["weights_sha256"] == "abc"
    assert (note["pictures"], note["crop"], note["pictures_sha256"]) == (
        5,
        "ADM, 28 px",
        direct.about["pictures_sha256"],
    )


def test_our_own_is_refused_where_it_does_not_fit(images, tmp_path):
    out, note = tmp_path / "made.npz", tmp_path / "made.json"
    make_reference(images, out, measurer(28))
    with pytest.raises(UserError, match="were cropped to ADM, 28 px, these are 32 px"):
        open_it(out, size=32)
    good = json.loads(note.read_text())
    for change, message in (
        ({"extractor": {"weights_sha256": "xyz"}}, r"other weights of the network \(sha256 xyz\)"),
        ({"npz_sha256": "0"}, "is not the file that made.json describes"),
        ({"pictures": None}, "the note that belongs to made.npz is missing or damaged"),
        ({"extractor": []}, r"made\.json: the note that belongs to made\.npz is missing or damaged"),
    ):
        note.write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match=message):
            open_it(out)
    note.unlink()
    with pytest.raises(UserError, match=r"made\.json: the note"):
        open_it(out)


def test_an_npz_that_is_no_reference_is_one_line_that_says_where_to_get_one(tmp_path):
    path = tmp_path / "adm.npz"
    eye = np.eye(DIM)
    for arrays, message in (
        ({"mu": np.zeros(DIM)}, r"sigma is missing, it must be floats \(2048, 2048\)"),
        (
            {"mu": np.zeros(9), "sigma": eye},
            r"mu is float64 \(9,\), it must be floats \(2048,\); for ImageNet get https",
        ),
        ({"mu": np.zeros(DIM, int), "sigma": eye}, "mu is int64"),
        ({"mu": np.full(DIM, np.nan), "sigma": eye}, "mu holds numbers that are not finite"),
        ({"weights": np.zeros(3)}, "a reference has mu and sigma, or images as arr_0, but this has weights"),
        ({"mu": np.zeros(DIM), "sigma": eye, "features": np.zeros(())}, "features is float64"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=message) as refused:
            open_it(path)
        assert "\n" not in str(refused.value)


def test_the_advice_fits_the_size_of_the_images():
    for size, sides in ((32, ()), (64, (64,)), (256, (256,)), (None, (64, 256))):
        advice = where_from(size)
        assert [side for side in (64, 256) if f"imagenet{side}_labeled.npz" in advice] == list(sides)
        assert "python -m evaluation.score DATA --make_reference FILE.npz" in advice
        assert ("--img_size" in advice) == (size is not None)
        of_other = where_from(size, EFFICIENTNET)
        assert of_other.endswith(" --features efficientnet_lite0")
        assert "imagenet" not in of_other


def test_a_network_that_this_version_does_not_know_is_refused(tmp_path):
    for name in ("dino\nv2", np.zeros(3), ["a"] * 1000):
        np.savez(tmp_path / "of.npz", mu=np.zeros(DIM), sigma=np.eye(DIM), network=name)
        with pytest.raises(
            UserError, match=r"of\.npz: holds features of .*, not of --features inception"
        ) as refused:
            open_it(tmp_path / "of.npz")
        assert str(refused.value).isprintable()
