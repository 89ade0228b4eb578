"""Images and masks in every form that users hand in are read as in training, or refused in one line."""

import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import random_values
from util.data.decode import open_rgb
from util.errors import UserError
from util.inputs import MAX_PIXELS, open_image, open_mask, to_mask_batch, to_value_batch

PIXELS = random_values(1, 6)[0].permute(1, 2, 0).numpy()
RGB = Image.fromarray(PIXELS)


def saved(path, image: Image.Image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.tif"])
def test_pixels_are_as_they_are_in_the_file(tmp_path, name):
    path = saved(tmp_path / name, RGB, **({"lossless": True} if name.endswith("webp") else {}))
    image, line = open_image(path)
    assert (np.asarray(image) == PIXELS).all()
    assert line == ""


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA"])
def test_opaque_modes_keep_their_colours(tmp_path, mode):
    image = RGB.convert(mode)
    path = saved(tmp_path / "a.png", image)
    found, line = open_image(path)
    assert (np.asarray(found) == np.asarray(image.convert("RGB"))).all()
    assert line == ""


def animated(folder):
    return saved(folder / "a.gif", RGB, save_all=True, append_images=[RGB.rotate(90)])


def transparent(folder):
    image = RGB.convert("RGBA")
    image.putpixel((0, 0), (1, 2, 3, 254))
    return saved(folder / "a.png", image)


def clear_colour(folder):
    return saved(folder / "a.png", RGB.convert("P"), transparency=int(np.asarray(RGB.convert("P"))[0, 0]))


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
    return saved(folder / "a.jpg", RGB.convert("CMYK"))


def huge(folder):
    return saved(folder / "a.png", Image.new("1", (MAX_PIXELS // 4096 + 1, 4096)))


def cut(folder):
    path = saved(folder / "a.png", RGB)
    path.write_bytes(path.read_bytes()[:60])
    return path


def text(folder):
    (folder / "a.png").write_text("no image")
    return folder / "a.png"


def on_its_side(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(folder / "a.png", RGB, exif=exif)


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
    assert (image.mode, np.asarray(image).tolist()) == ("RGB", np.asarray(open_rgb(path)).tolist())


def test_transparent_pixels_lie_over_white_and_16_bits_are_scaled(tmp_path, caplog):
    clear = RGB.convert("RGBA")
    clear.putpixel((0, 0), (9, 9, 9, 0))
    deep = Image.fromarray(np.full((6, 6), 40000, np.uint16))
    for image, value in ((clear, 255), (deep, round(40000 / 257))):
        image.save(tmp_path / "a.png")
        found = to_value_batch([image, Image.open(tmp_path / "a.png")])
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
    path = saved(tmp_path / "a.png", RGB)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(path)[0].size == (6, 6)


@pytest.mark.parametrize(
    "images",
    [
        RGB,
        [RGB],
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
    found = to_value_batch(images)
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
        ([RGB, RGB.resize((5, 5))], "images of different sizes, 5 x 5, 6 x 6"),
        ("a.png", "must be a PIL image, an array or a tensor, or a list of them, got str"),
        (PIXELS.astype(str), "image has <U3 values; it must be of integers or floats"),
    ],
)
def test_images_out_of_range_are_named(images, message):
    with pytest.raises(UserError, match=message):
        to_value_batch(images)


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
        (RGB, "mask is not binary"),
        (np.ones((6, 5)), "mask of 5 x 6 pixels for an image of 6 x 6"),
    ],
)
def test_masks_out_of_range_are_named(masks, message):
    with pytest.raises(UserError, match=message):
        to_mask_batch(masks, (6, 6))
