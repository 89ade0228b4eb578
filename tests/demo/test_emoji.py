"""The bundled model, the preparation of its data set, and the functions of demo/emoji.py."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))
import baselines
import emoji
import emoji_data

from engine_fractalgen import compute_nll
from models import fractalgen
from models.fractalgen import FractalGen
from models.hub import zoo
from util import checkpoint
from util.data.loader import ImageDataset, make_loader, open_split
from util.dist import World
from util.pixels import RGB

FOLDER = zoo.BUNDLED["emoji"]
# Holds val/CLASS/NAME.png, one held-out emoji of each class.
HELD_OUT = Path(__file__).parents[1] / "golden" / "emoji"


@pytest.fixture(scope="module")
def model():
    return FractalGen.from_pretrained(FOLDER)


def test_the_bundled_model_is_small_and_has_class_names_licence_and_guiding_pixels(model):
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12e6
    assert model.class_names == tuple(emoji_data.CLASSES)
    assert all(weight.dtype == torch.float32 for weight in model.state_dict().values())
    assert model.img_size_list[0] == emoji_data.SIDE
    assert model.config["guiding_pixel"]
    assert (model.about.data, model.about.limits) == (emoji.TRAINED_ON, emoji.LIMITS)
    card = (FOLDER / "README.md").read_text()
    assert f"{model.about.bits_per_dim} bits/dim" in card
    for text in (emoji_data.PACKAGE, "Apache", "python demo/emoji.py"):
        assert text in card


def bits_per_dim(model, folder: Path, passes: int = 8, **settings) -> float:
    loader = make_loader(
        ImageDataset(open_split(folder, "val"), (32, 32), RGB, seed=0),
        16,
        World(),
        shuffled=False,
        num_workers=0,
        pin_memory=False,
    )
    scores = compute_nll(
        model, loader, passes=passes, seed=0, device=torch.device("cpu"), autocast=nullcontext(), world=World(),
        conditional=True, progress_bar=False, **settings,
    )  # fmt: skip
    return scores["bits_per_dim"]


def test_held_out_emoji_cost_the_known_bits_and_less_than_png(model):
    bits = bits_per_dim(model, HELD_OUT)
    files = emoji.lossless_bits_per_dim(emoji.read_split(HELD_OUT / "val")[0])
    assert bits == pytest.approx(2.435, abs=0.02)
    assert bits < files["PNG, one file per image"]


def test_it_draws_images_of_the_class_asked_for(model):
    """Draws faces in few steps, to be quick: they are yellow in the middle, on white."""
    images = model.generate([3] * 4, num_inference_steps=(8, 4), seed=0, progress_bar=False)
    assert {image.size for image in images} == {(32, 32)}
    values = np.stack([np.asarray(image) for image in images]).astype(float)
    red, green, blue = values[:, 12:20, 12:20].mean((0, 1, 2))
    assert red > blue + 60
    assert green > blue + 40
    assert values[:, :2, :2].mean() > 240


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package like npm's, with ten emoji in each class, and variants where the class has skin tones."""
    folder = tmp_path_factory.mktemp("package")
    images = folder / "img" / "google" / "64"
    images.mkdir(parents=True)
    rng, emojis = np.random.default_rng(0), []

    def draw(name: str) -> str:
        rgba = np.zeros((64, 64, 4), np.uint8)
        rgba[8:56, 8:56] = np.append(rng.integers(0, 256, (48, 48, 3)), np.full((48, 48, 1), 255), axis=2)
        Image.fromarray(rgba).save(images / name)
        return name

    for number, (label, (wanted, _, tones)) in enumerate(emoji_data.CLASSES.items()):
        for i in range(10):
            name = wanted.split()[i] if label == "clock" else f"{label}{i}"
            code = f"1F4{number:X}{i:X}-FE0F"
            entry = {
                "subcategory": wanted.split()[0],
                "short_name": name,
                "unified": code,
                "image": draw(f"{code}.png"),
            }
            entry["skin_variations"] = {tone: {"image": draw(f"{code}-{tone}.png")} for tone in tones.split()}
            emojis.append(entry)
    lookalike = {
        **emojis[0],
        "short_name": "lookalike",
        "unified": "1F499",
    }  # another emoji with the same image
    (folder / "emoji.json").write_text(json.dumps([*emojis, lookalike]))
    return folder


def test_families_are_whole_and_only_training_images_are_copied(package, tmp_path):
    emoji_data.write_emoji(tmp_path / "data", package)
    again = tmp_path / "again"
    emoji_data.write_emoji(again, package)
    found = {
        str(path.relative_to(tmp_path / "data")): path.read_bytes()
        for path in (tmp_path / "data").rglob("*.png")
    }
    assert found == {str(path.relative_to(again)): path.read_bytes() for path in again.rglob("*.png")}
    assert len(set(found.values())) == len(found)
    for label, (_, mirrored, tones) in emoji_data.CLASSES.items():
        names = {
            split: [path.stem for path in (tmp_path / "data" / split / label).iterdir()]
            for split in ("train", "val")
        }
        plain = {
            split: {emoji_data.COPY.sub("", stem).split("-")[0] for stem in stems}
            for split, stems in names.items()
        }
        assert not plain["train"] & plain["val"]
        assert len(names["val"]) == 2 * (1 + len(tones.split()))  # every 8th of 10
        assert not any(emoji_data.COPY.search(stem) for stem in names["val"])
        assert any(stem.endswith("-mirrored") for stem in names["train"]) == mirrored
        assert len(names["train"]) > 50
    assert open_split(tmp_path / "data", "val").classes == list(emoji_data.CLASSES)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1F468-200D-1F33E", "1F9D1-1F3FC-200D-1F33E"),  # a man who is a farmer, any farmer
        ("1F645-200D-2642-FE0F", "1F645"),
        ("1F3C3-200D-2640-FE0F-200D-27A1-FE0F", "1F3C3"),
    ],
)
def test_variants_of_skin_gender_and_direction_are_a_family(one, other):
    assert emoji_data.family({"unified": one}) == emoji_data.family({"unified": other})
    assert emoji_data.family({"unified": one}) != emoji_data.family({"unified": "1F468-200D-1F373"})


def test_a_pixel_is_the_mean_of_four_over_white(tmp_path):
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[0, 0] = (100, 0, 0, 255)  # the other three are transparent
    Image.fromarray(rgba).save(tmp_path / "a.png")
    values = np.asarray(emoji_data.on_white(tmp_path / "a.png"))
    assert values.shape == (32, 32, 3)
    assert np.abs(values[0, 0] - [216.25, 191.25, 191.25]).max() < 1
    assert (values.reshape(-1, 3)[1:] == 255).all()
    assert (np.asarray(emoji_data.on_white(tmp_path / "a.png", (2, 0)))[0, 1] == values[0, 0]).all()


def test_averaged_weights_are_saved_as_float16_and_loaded_as_float32(tmp_path):
    trained = fractalgen.build(emoji.NAME, class_num=len(emoji_data.CLASSES))
    torch.save({"model": {}, "model_ema": trained.state_dict()}, tmp_path / checkpoint.NAME)
    (tmp_path / "data" / "val" / "face").mkdir(parents=True)
    for name, colour in (("a", "white"), ("b", "red")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "data" / "val" / "face" / f"{name}.png")
    emoji.save_model(tmp_path, tmp_path / "data", tmp_path / "model")
    loaded = FractalGen.from_pretrained(tmp_path / "model")
    assert loaded.about.limits == emoji.LIMITS
    assert loaded.about.bits_per_dim == pytest.approx(8.5, abs=0.2)  # pixels 8, guiding pixels 8 / 16
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 12e6
    for name, weight in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.half().float())


def test_nearest_images_are_found():
    train = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
    numbers, distances = baselines.nearest(train[[7, 3]], train)
    assert numbers[:, 0].tolist() == [7, 3]
    assert distances.max() < 1e-3
    assert baselines.nearest(train[:1] // 2 + 1, train[1:])[1] > 10


def test_training_images_to_compare_with_are_as_many_as_held_out_ones_and_no_copies(package, tmp_path):
    emoji_data.write_emoji(tmp_path / "data", package)
    emoji.write_trained_on(tmp_path / "data", tmp_path / "seen")
    for label in emoji_data.CLASSES:
        held_out, seen = (list((tmp_path / folder / "val" / label).iterdir()) for folder in ("data", "seen"))
        assert len(seen) == len(held_out)
        assert not any(emoji_data.COPY.search(path.stem) for path in seen)


def test_a_folder_that_cannot_be_made_is_refused_before_the_download(monkeypatch, capsys):
    monkeypatch.setattr(emoji_data, "prepare", None)
    with pytest.raises(SystemExit, match="2"):
        emoji_data.main(["/proc/x"])
    assert (
        capsys.readouterr().err
        == "emoji_data.py: error: /proc/x: cannot be written (No such file or directory)\n"
    )


def test_without_npm_or_its_package_the_error_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    for flags in ([], ["--package", str(tmp_path / "none")]):
        with pytest.raises(SystemExit, match="2"):
            emoji_data.main([str(tmp_path / "data"), *flags])
        assert capsys.readouterr().err.count("\n") == 1
