"""Images and masks in every form that users hand in are read as in training, or refused in one line."""

import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import random_values
from util.data.decode import open_as
from util.errors import UserError
from util.inputs import MAX_PIXELS, open_image, open_mask, to_mask_batch, to_value_batch
from util.pixels import RGB, Alphabet

PIXELS = random_values(1, 6)[0].permute(1, 2, 0).numpy()
IMAGE = Image.fromarray(PIXELS)


def saved(path, image: Image.Image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.tif"])
def test_pixels_are_as_they_are_in_the_file(tmp_path, name):
    path = saved(tmp_path / name, IMAGE, **({"lossless": True} if name.endswith("webp") else {}))
    image, line = open_image(path)
    assert (np.asarray(image) == PIXELS).all()
    assert line == ""


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA"])
def test_opaque_modes_keep_their_colours(tmp_path, mode):
    image = IMAGE.convert(mode)
    path = saved(tmp_path / "a.png", image)
    found, line = open_image(path)
    assert (np.asarray(found) == np.asarray(image.convert("RGB"))).all()
    assert line == ""


def animated(folder):
    return saved(folder / "a.gif", IMAGE, save_all=True, append_images=[IMAGE.rotate(90)])


def transparent(folder):
    image = IMAGE.convert("RGBA")
    image.putpixel((0, 0), (1, 2, 3, 254))
    return saved(folder / "a.png", image)


def clear_colour(folder):
    return saved(folder / "a.png", IMAGE.convert("P"), transparency=int(np.asarray(IMAGE.convert("P"))[0, 0]))


def deep(folder):
    return saved(folder / "a.png", Image.fromarray(np.full((4, 4), 40000, np.uint16)))


def deep_colours(folder):
    # Pillow cannot write 16-bit colours.
    rows = b"".join(b"\0" + struct.pack(">12H", *range(1000, 1012)) for _ in range(4))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return folder / "a.png"


def cmyk(folder):
    return saved(folder / "a.jpg", IMAGE.convert("CMYK"))


def huge(folder):
    return saved(folder / "a.png", Image.new("1", (MAX_PIXELS // 4096 + 1, 4096)))


def cut(folder):
    path = saved(folder / "a.png", IMAGE)
    path.write_bytes(path.read_bytes()[:60])
    return path


def text(folder):
    (folder / "a.png").write_text("no image")
    return folder / "a.png"


def on_its_side(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(folder / "a.png", IMAGE, exif=exif)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (animated, "frame 1 of 2 is taken"),
        (transparent, "transparent pixels lie over white"),
        (clear_colour, "transparent pixels lie over white"),
        (deep, "16 bits a channel are scaled to 8"),
        (deep_colours, "16 bits a channel are scaled to 8"),
        (cmyk, "its mode CMYK is converted to RGB"),
        (on_its_side, "it is turned upright"),
    ],
)
def test_files_are_read_as_in_training_and_a_line_says_what_was_changed(tmp_path, make, line):
    path = make(tmp_path)
    image, said = open_image(path)
    assert said == f"{path}: {line}"
    assert (image.mode, np.asarray(image).tolist()) == ("RGB", np.asarray(open_as(path)).tolist())


def test_transparent_pixels_lie_over_white_and_16_bits_are_scaled(tmp_path, caplog):
    clear = IMAGE.convert("RGBA")
    clear.putpixel((0, 0), (9, 9, 9, 0))
    deep = Image.fromarray(np.full((6, 6), 40000, np.uint16))
    for image, value in ((clear, 255), (deep, round(40000 / 257))):
        image.save(tmp_path / "a.png")
        found = to_value_batch([image, Image.open(tmp_path / "a.png")], (None, None), RGB)
        assert found[:, :, 0, 0].unique().tolist() == [value]
        assert (found[1].permute(1, 2, 0).numpy() == np.asarray(open_image(tmp_path / "a.png")[0])).all()
    assert caplog.messages == [
        "image: transparent pixels lie over white",
        "image: 16 bits a channel are scaled to 8",
    ]


def test_a_transparent_mask_is_refused_because_its_white_is_not_known(tmp_path):
    mask = Image.new("RGBA", (6, 6), (255, 255, 255, 0))
    message = "a mask with transparent pixels; make each pixel black"
    with pytest.raises(UserError, match=message):
        to_mask_batch(mask, (6, 6))
    with pytest.raises(UserError, match=f"a.png: {message}"):
        open_mask(saved(tmp_path / "a.png", mask))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (huge, "16385 x 4096 pixels are too many"),
        (cut, "cannot be read as an image"),
        (text, "cannot be read as an image"),
        (lambda folder: folder / "none.png", "No such file"),
    ],
)
def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path, make, message):
    path = make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_image(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_an_error_that_says_nothing_is_named_by_its_type(monkeypatch):
    def fail(path):
        raise RuntimeError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UserError, match=r"a.png: cannot be read as an image \(RuntimeError\)"):
        open_image("a.png")


def test_an_image_that_pillow_warns_of_is_one_line_too(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", IMAGE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(path)[0].size == (6, 6)


@pytest.mark.parametrize(
    "images",
    [
        IMAGE,
        [IMAGE],
        PIXELS,
        PIXELS[None],
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        PIXELS / 255,
        PIXELS.astype(np.int64),
        PIXELS.astype(">u2"),
        PIXELS.astype(np.uint32),
        [PIXELS],
    ],
)
def test_images_of_any_kind(images):
    found = to_value_batch(images, (None, None), RGB)
    assert found.dtype == torch.uint8
    assert (found.permute(0, 2, 3, 1).numpy() == PIXELS).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            PIXELS.astype(np.float32),
            "torch.float32 values from 1 to 254; give integers 0 to 255, or floats 0 to 1",
        ),
        (PIXELS.astype(np.int16) - 300, "torch.int16 values from -299 to -46"),
        (PIXELS / 255 * 2 - 1, "floats 0 to 1"),
        (np.full((2, 2, 3), np.nan), "values from nan to nan"),
        (
            PIXELS[..., :2],
            r"image of shape \(6, 6, 2\); it must have 3 channels, NumPy's last and torch's first",
        ),
        (torch.from_numpy(PIXELS), r"image of shape \(6, 6, 3\)"),
        (np.zeros((0, 6, 6, 3)), "image of shape"),
        ([], "an empty list"),
        ([IMAGE, IMAGE.resize((5, 5))], "images of different sizes, 5 x 5 pixels, 6 x 6 pixels"),
        ("a.png", "must be a PIL image, an array or a tensor, or a list of them, got str"),
        (PIXELS.astype(str), "image has <U3 values; it must be of integers or floats"),
    ],
)
def test_images_out_of_range_are_named(images, message):
    with pytest.raises(UserError, match=message):
        to_value_batch(images, (None, None), RGB)


@pytest.mark.parametrize("white", [1, 255])
def test_masks_of_any_kind(white):
    mask = np.zeros((6, 6), np.uint8)
    mask[2:4, 1] = white
    kinds = [
        mask,
        mask[None],
        mask[..., None],
        mask > 0,
        mask / 1.0,
        torch.from_numpy(mask),
        torch.from_numpy(mask)[None, None],
    ]
    kinds += [
        Image.fromarray(mask > 0),
        Image.fromarray(np.uint8(mask > 0) * 255),
        Image.fromarray(np.uint8(mask > 0) * 255).convert("RGB"),
    ]
    for kind in kinds:
        found = to_mask_batch(kind, (6, 6))
        assert found.shape == (1, 6, 6)
        assert (found[0].numpy() == (mask > 0)).all()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.full((6, 6), 7), "mask is not binary, it has a value 7; 0 is kept, 1 \\(or 255\\) is repainted"),
        (np.full((6, 6), 0.5), "mask is not binary, it has a value 0.5"),
        (np.full((6, 6), -1), "mask is not binary"),
        (np.full((6, 6), np.nan), "mask is not binary"),
        (IMAGE, "mask is not binary"),
        (np.ones((6, 5)), "mask of 5 x 6 pixels for an image of 6 x 6 pixels"),
    ],
)
def test_masks_out_of_range_are_named(masks, message):
    with pytest.raises(UserError, match=message):
        to_mask_batch(masks, (6, 6))


NOTES = Alphabet(4, 50, "categorical")


def grid(*shape: int, top: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, top, shape)


@pytest.mark.parametrize(
    ("shape", "alphabet"),
    [((16,), NOTES), ((16,), Alphabet(1, 2)), ((6, 9), Alphabet(2, 65536)), ((3, 5, 7), Alphabet(1, 17))],
)
def test_arrays_of_any_grid_and_alphabet(shape, alphabet):
    values = grid(2, *shape, alphabet.channels, top=alphabet.num_values)  # channels last
    first = torch.from_numpy(values).movedim(-1, 1)
    kinds = [values, first, list(values), list(first), values.astype(np.uint16), [values[0], first[1]]]
    if alphabet.channels == 1:
        kinds += [values[..., 0], first[:, 0], [values[0, ..., 0], first[1, 0]]]
    if alphabet.num_values == 2:
        kinds += [values.astype(bool)]
    if alphabet.is_ordinal:
        kinds += [values / (alphabet.num_values - 1)]
    for kind in kinds:
        found = to_value_batch(kind, shape, alphabet)
        assert found.dtype == alphabet.dtype
        assert torch.equal(found.long(), first)
    assert torch.equal(to_value_batch(values[0], [None] * len(shape), alphabet).long(), first[:1])


@pytest.mark.parametrize(
    "alphabet", [Alphabet(1, 17), Alphabet(3, 32), Alphabet(4, 2), Alphabet(1, 17, "categorical")]
)
def test_pil_images_hold_samples_and_what_a_model_has_drawn_comes_back(alphabet):
    values = grid(2, 6, 9, alphabet.channels, top=alphabet.num_values)
    samples = alphabet.to_bytes(values)
    images = [Image.fromarray(image[..., 0] if alphabet.channels == 1 else image) for image in samples]
    found = to_value_batch(images, (6, 9), alphabet)
    assert np.array_equal(found.movedim(1, -1), values)
    assert torch.equal(to_value_batch([images[0], values[1]], (6, 9), alphabet), found)


def test_images_become_those_of_the_channels(caplog):
    clear = IMAGE.convert("RGBA")
    clear.putpixel((0, 0), (9, 9, 9, 0))
    assert to_value_batch(clear, (None, None), Alphabet(4))[0, :, 0, 0].tolist() == [9, 9, 9, 0]
    assert caplog.messages == []
    assert to_value_batch(clear, (None, None), Alphabet(1))[0, :, 0, 0].tolist() == [255]
    assert caplog.messages == ["image: transparent pixels lie over white"]
    assert np.array_equal(to_value_batch(IMAGE, (None, None), Alphabet(1))[0, 0], IMAGE.convert("L"))


@pytest.mark.parametrize(
    ("images", "shape", "alphabet", "message"),
    [
        (grid(16, 4, top=51), (16,), NOTES, "image has torch.int64 values from 0 to 50; give integers 0 to 49$"),
        (grid(16, 4, top=1) / 2, (16,), NOTES, "torch.float64 values from 0 to 0; give integers 0 to 49$"),
        (grid(9, 9, top=2) > 0, (9, 9), Alphabet(1, 3), "torch.bool values from 0 to 1; give integers 0 to 2, or floats"),
        (grid(15, 4, top=9), (16,), NOTES, "image of 15 cells for a model of 16 cells; crop it first"),
        (grid(4, 6, 7, top=9), (4, 6, 8), Alphabet(1, 9), "image of 4 x 6 x 7 cells for a model of 4 x 6 x 8"),
        (PIXELS, (6, 9), RGB, "image of 6 x 6 pixels for a model of 9 x 6 pixels; crop it first"),
        (PIXELS, (8, 8), RGB, r"image of 6 x 6 pixels for a model of 8 x 8 pixels; crop it first \(util.crop.center_crop_arr\)$"),
        (grid(16, 3, top=9), (16,), NOTES, r"image of shape \(16, 3\); it must have 4 channels on a 1-axis grid"),
        (grid(16, top=9), (16,), NOTES, r"image of shape \(16,\); it must have 4 channels"),
        (IMAGE, (36,), NOTES, "image: a PIL image has two axes, 1, 3 or 4 channels and up to 256 values; give an array"),
        (IMAGE, (6, 6), Alphabet(3, 257), "a PIL image has two axes"),
        ([grid(16, 4, top=9), grid(15, 4, top=9)], (16,), NOTES, "images of different sizes, 15 cells, 16 cells"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_named(images, shape, alphabet, message):
    with pytest.raises(UserError, match=message):
        to_value_batch(images, shape, alphabet)


@pytest.mark.parametrize("shape", [(16,), (6, 9), (3, 5, 7)])
def test_masks_lie_over_cells(shape):
    mask = grid(2, *shape, top=2)
    for kind in (
        mask,
        mask > 0,
        mask * 255,
        mask[..., None],
        torch.from_numpy(mask)[:, None],
        list(mask),
        mask / 1.0,
    ):
        found = to_mask_batch(kind, shape)
        assert found.dtype == torch.bool
        assert np.array_equal(found, mask > 0)
    with pytest.raises(UserError, match=r"mask of .* for an image of .*; they must be of one size"):
        to_mask_batch(mask[:, 1:], shape)


def test_files_are_opened_in_the_mode_of_a_model(tmp_path):
    path = transparent(tmp_path)
    image, line = open_image(path, "RGBA")
    assert (image.mode, line, image.getpixel((0, 0))) == ("RGBA", "", (1, 2, 3, 254))
    image, line = open_image(path, "L")
    assert (image.mode, line) == ("L", f"{path}: transparent pixels lie over white")
