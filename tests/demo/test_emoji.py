"""The bundled model, the preparation of its data set, and the functions of demo/emoji.py."""

import json
import re
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
from models.likelihood.bits import is_exact
from util import checkpoint
from util.data.loader import ImageDataset, make_loader, open_split
from util.dist import World
from util.errors import UserError
from util.pixels import RGB, TEXT

FOLDER = zoo.BUNDLED["emoji"]
# Holds val/CLASS/NAME.png, one held-out emoji of each class.
HELD_OUT = Path(__file__).parents[1] / "golden" / "emoji"


@pytest.fixture(scope="module")
def model():
    return FractalGen.from_pretrained(FOLDER)


def test_the_bundled_model_is_small_and_has_class_names_licences_and_exact_bits(model):
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12e6
    assert model.class_names == tuple(emoji_data.CLASSES)
    assert all(weight.dtype == torch.float32 for weight in model.state_dict().values())
    assert model.img_size_list[0] == emoji_data.SIDE
    assert is_exact(model)
    assert (model.about.data, model.about.limits) == (emoji.TRAINED_ON, emoji.LIMITS)
    card = (FOLDER / "README.md").read_text()
    assert f"{model.about.bits_per_dim} bits/dim" in card
    for text in (*emoji_data.PACKAGES.values(), "Apache", "CC-BY 4.0", "MIT", "python demo/emoji.py"):
        assert text in card


def bits_per_dim(model, folder: Path, **settings) -> float:
    loader = make_loader(
        ImageDataset(open_split(folder, "val"), (32, 32), RGB, seed=0),
        16,
        World(),
        shuffled=False,
        num_workers=0,
        pin_memory=False,
    )
    scores = compute_nll(
        model, loader, passes=1, seed=0, device=torch.device("cpu"), autocast=nullcontext(), world=World(),
        conditional=True, progress_bar=False, **settings,
    )  # fmt: skip
    return scores["bits_per_dim"]


def test_held_out_emoji_cost_the_known_bits_and_less_than_png(model):
    bits = bits_per_dim(model, HELD_OUT)
    files = emoji.lossless_bits_per_dim(emoji.read_split(HELD_OUT / "val")[0])
    assert bits == pytest.approx(2.3727, abs=1e-3)  # exact
    assert bits < files["PNG, one file per image"]


def test_it_draws_images_of_the_class_asked_for(model):
    """Faces are yellow in the middle, on white."""
    images = model.generate(["face"] * 4, seed=0, progress_bar=False)
    assert {image.size for image in images} == {(32, 32)}
    values = np.stack([np.asarray(image) for image in images]).astype(float)
    red, green, blue = values[:, 12:20, 12:20].mean((0, 1, 2))
    assert red > blue + 60
    assert green > blue + 40
    assert values[:, :2, :2].mean() > 240


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Packages like npm's: ten emoji of each class, with variants where it has skin tones, and ten left out."""
    folder = tmp_path_factory.mktemp("packages")
    noto, twemoji, fluent = (emoji_data.package_folder(folder, vendor) for vendor in emoji_data.PACKAGES)
    targets = noto / "img" / "google" / "64", twemoji / "img" / "twitter" / "64"
    for target in (*targets, fluent):
        target.mkdir(parents=True)
    rng, emojis, icons, codes = np.random.default_rng(0), [], {}, {}

    def draw(code: str) -> str:
        for target in targets:
            rgba = np.zeros((64, 64, 4), np.uint8)
            rgba[8:56, 8:56] = np.append(rng.integers(0, 256, (48, 48, 3)), np.full((48, 48, 1), 255), axis=2)
            Image.fromarray(rgba).save(target / f"{code}.png")
        colour = f"rgb({','.join(map(str, rng.integers(0, 256, 3)))})"
        icons[f"name-{code}"] = {"body": f'<path fill="{colour}" d="M4 4h9v16H4z"/>'}
        codes[code.replace("-fe0f", "")] = f"name-{code}"
        return f"{code}.png"

    def add(label: str, subcategory: str, name: str, code: str, tones: str) -> None:
        emojis.append(
            {
                "subcategory": subcategory, "short_name": name, "unified": code.upper(), "image": draw(code),
                "skin_variations": {tone: {"image": draw(f"{code}-{tone.lower()}")} for tone in tones.split()},
            }
        )  # fmt: skip

    for number, (label, (wanted, _, tones)) in enumerate(emoji_data.CLASSES.items(), 1):
        for i in range(10):
            add(label, wanted.split()[0], f"{label}{i}", f"1f4{number:x}{i:x}-fe0f", tones)
    for i in range(10):
        add("person", "person-role", f"role{i}", f"1f5{i:x}", "")
    emojis.append({**emojis[0], "short_name": "lookalike", "unified": "1F499"})  # the image of another emoji
    (noto / "emoji.json").write_text(json.dumps(emojis))
    icons["parent"] = icons.pop(alias := next(iter(icons)))
    aliases = {alias: {"parent": "parent"}}
    (fluent / "icons.json").write_text(json.dumps({"icons": icons, "aliases": aliases, "width": 32}))
    (fluent / "chars.json").write_text(json.dumps(codes))
    return folder


def test_families_are_whole_in_all_vendors_and_only_training_images_are_copied(packages, tmp_path):
    pytest.importorskip("resvg_py")
    data, again = tmp_path / "data", tmp_path / "again"
    emoji_data.write_emoji(data, packages)
    emoji_data.write_emoji(again, packages)
    found, same = (
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.png")}
        for root in (data, again)
    )
    assert found == same
    assert len(set(found.values())) == len(found)
    for label, (_, mirrored, tones) in emoji_data.CLASSES.items():
        train, val = ([path.stem for path in (data / split / label).iterdir()] for split in ("train", "val"))
        name = re.compile(rf"^(?:(twemoji|fluent)-)?({label}\d+)")
        vendors, families = zip(*(name.match(stem).groups() for stem in train), strict=True)
        assert set(vendors) == {None, "twemoji", "fluent"}
        held_out = {name.match(stem)[2] for stem in val}
        assert not held_out & set(families)
        assert len(held_out | set(families)) == 10  # nothing that is left out
        assert {
            stem.removesuffix(f"-{tone}") for stem in val for tone in tones.split() or ["none"]
        } >= held_out
        assert len(val) == len(held_out) * (1 + len(tones.split()))
        assert any(stem.endswith("-mirrored") for stem in train) == mirrored
        assert len(train) > 50
    assert open_split(data, "val").classes == list(emoji_data.CLASSES)


def test_what_is_left_out_does_not_change_what_is_held_out(packages, tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    emoji_data.write_emoji(tmp_path / "fewer", packages)
    monkeypatch.setattr(emoji_data, "LEFT_OUT", set())
    emoji_data.write_emoji(tmp_path / "all", packages)
    fewer, every = (
        {path.name for path in (tmp_path / name / "val" / "person").iterdir()} for name in ("fewer", "all")
    )
    assert fewer == {name for name in every if not name.startswith("role")} != every


def test_without_what_renders_svg_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    monkeypatch.setattr(emoji_data, "fetch", lambda folder: pytest.fail("downloaded"))
    with pytest.raises(UserError, match=r"resvg_py.*pip install"):
        emoji_data.prepare(tmp_path / "data")


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


def test_a_pixel_is_the_mean_of_four_over_white():
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[0, 0] = (100, 0, 0, 255)  # the other three are transparent
    image = Image.fromarray(rgba)
    values = np.asarray(emoji_data.on_white(image))
    assert values.shape == (32, 32, 3)
    assert np.abs(values[0, 0] - [216.25, 191.25, 191.25]).max() < 1
    assert (values.reshape(-1, 3)[1:] == 255).all()
    assert (np.asarray(emoji_data.on_white(image, (2, 0)))[0, 1] == values[0, 0]).all()


def test_averaged_weights_are_saved_as_float16_and_loaded_as_float32(tmp_path):
    trained = fractalgen.build(emoji.NAME, class_num=len(emoji_data.CLASSES))
    torch.save({"model": {}, "model_ema": trained.state_dict()}, tmp_path / checkpoint.NAME)
    (tmp_path / "data" / "val" / "face").mkdir(parents=True)
    for name, colour in (("a", "white"), ("b", "red")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "data" / "val" / "face" / f"{name}.png")
    emoji.save_model(tmp_path, tmp_path / "data", tmp_path / "model")
    loaded = FractalGen.from_pretrained(tmp_path / "model")
    assert loaded.about.limits == emoji.LIMITS
    assert loaded.about.bits_per_dim == pytest.approx(8, abs=0.2)
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 12e6
    for name, weight in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.half().float())


def test_nearest_images_are_found():
    train = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
    numbers, distances = baselines.nearest(train[[7, 3]], train)
    assert numbers[:, 0].tolist() == [7, 3]
    assert distances.max() < 1e-3
    assert baselines.nearest(train[:1] // 2 + 1, train[1:])[1] > 10


def test_samples_are_framed_and_their_neighbours_follow():
    grey = lambda value: Image.new("L", (8, 8), value)  # noqa: E731
    neighbours = np.stack([np.stack([np.asarray(grey(10 * i + j)) for j in (1, 2)]) for i in (1, 2)])
    sheet = np.asarray(baselines.draw_nearest([grey(10), grey(20)], neighbours, 1, ["a", "b"]))
    top, pitch, gap = TEXT, 16 + 2 + 2, 2
    left = sheet.shape[1] - gap - 8 - 3 * (16 + gap)
    for row, value in enumerate((10, 20)):
        y = top + row * pitch
        assert sheet[y, left].tolist() == [0xE8, 0x59, 0x0C]
        assert [sheet[y + 8, left + 8 + 18 * k].tolist() for k in range(3)] == [
            [value + k] * 3 for k in range(3)
        ]


def test_training_images_to_compare_with_are_as_many_as_held_out_ones_and_no_copies(packages, tmp_path):
    pytest.importorskip("resvg_py")
    emoji_data.write_emoji(tmp_path / "data", packages)
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


def test_without_npm_or_its_packages_the_error_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    for flags in ([], ["--packages", str(tmp_path / "none")]):
        with pytest.raises(SystemExit, match="2"):
            emoji_data.main([str(tmp_path / "data"), *flags])
        assert capsys.readouterr().err.count("\n") == 1
