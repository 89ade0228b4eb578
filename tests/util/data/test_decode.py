"""Image files of every common kind are converted to grey, RGB or RGBA, or refused by an error that names them."""

import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from util.crop import center_crop_arr
from util.data.decode import open_as
from util.data.loader import ImageDataset
from util.data.source import Files
from util.errors import UserError
from util.pixels import Alphabet


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_grey_palette_and_cmyk_become_rgb(tmp_path):
    colours = Image.new("RGB", (4, 4), (10, 200, 30))
    colours.quantize(2).save(tmp_path / "palette.png")
    colours.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    colours.convert("1").save(tmp_path / "bits.png")
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")
    assert (pixels(open_as(tmp_path / "grey.png")) == 77).all()
    assert abs(pixels(open_as(tmp_path / "cmyk.jpg")) - (10, 200, 30)).max() <= 3
    assert abs(pixels(open_as(tmp_path / "palette.png")) - (10, 200, 30)).max() <= 1
    assert set(pixels(open_as(tmp_path / "bits.png")).flatten()) <= {0, 255}


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)).save(
        tmp_path / "deep.png"
    )
    assert (pixels(open_as(tmp_path / "deep.png"))[..., 0].flatten() == np.linspace(0, 255, 64).round()).all()


def test_transparency_lies_over_white(tmp_path):
    Image.new("RGBA", (2, 2), (255, 0, 0, 128)).save(tmp_path / "half.png")
    Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "clear.png")
    assert abs(pixels(open_as(tmp_path / "half.png")) - (255, 127, 127)).max() <= 1
    assert (pixels(open_as(tmp_path / "clear.png")) == 255).all()


def test_sixteen_bit_colour_keeps_its_high_byte(tmp_path):
    values = (np.arange(48).reshape(4, 4, 3) * 1365).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    (tmp_path / "deep.png").write_bytes(png(4, 4, depth=16, colour=2, rows=rows))
    assert (pixels(open_as(tmp_path / "deep.png")) == values >> 8).all()


def test_transparent_palette_entries_become_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "clear.png", transparency=1)
    assert pixels(open_as(tmp_path / "clear.png")).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("orientation", "as_shown"), [(1, [[0, 85], [170, 255]]), (3, [[255, 170], [85, 0]]), (6, [[170, 0], [255, 85]]), (8, [[85, 255], [0, 170]])]
)  # fmt: skip
def test_exif_rotation_is_applied(orientation, as_shown, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.array([[0, 85], [170, 255]], np.uint8)).resize((16, 16), 0).save(
        tmp_path / "a.jpg", exif=exif, quality=100
    )
    shown = pixels(open_as(tmp_path / "a.jpg"))[4::8, 4::8, 0]
    assert abs(shown - as_shown).max() <= 1


def test_grey_is_the_luma_of_what_rgb_would_be(tmp_path):
    colour = Image.effect_noise((6, 6), 90).convert("RGB").rotate(90)
    clear = colour.convert("RGBA")
    clear.putpixel((0, 0), (10, 20, 30, 0))
    deep = Image.fromarray(np.linspace(0, 65535, 36).astype(np.uint16).reshape(6, 6))
    for number, image in enumerate(
        (colour, clear, deep, colour.quantize(3), colour.convert("1"), colour.convert("CMYK"))
    ):
        path = tmp_path / f"{number}.{'tif' if image.mode == 'CMYK' else 'png'}"
        image.save(path)
        grey = open_as(path, "L")
        assert grey.mode == "L"
        assert np.array_equal(np.asarray(grey), np.asarray(open_as(path).convert("L")))
    assert np.asarray(open_as(tmp_path / "1.png", "L"))[0, 0] == 255
    assert np.array_equal(
        np.asarray(open_as(tmp_path / "2.png", "L")).ravel(), np.linspace(0, 255, 36).round()
    )
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    assert np.array_equal(np.asarray(open_as(tmp_path / "grey.png", "L")), values)


def test_rgba_keeps_transparency_and_is_opaque_where_there_is_none(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 4), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(open_as(tmp_path / "a.png", "RGBA")), colours)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=1)
    assert np.asarray(open_as(tmp_path / "p.png", "RGBA")).tolist() == [[[10, 20, 30, 255], [40, 50, 60, 0]]]
    opaque = Image.fromarray(colours[..., :3])
    deep = Image.fromarray(np.full((4, 4), 257 * 9, np.uint16))
    for number, (image, expected) in enumerate(
        ((opaque, colours[..., :3]), (deep, 9), (opaque.convert("L"), None))
    ):
        image.save(tmp_path / f"{number}.png")
        found = np.asarray(open_as(tmp_path / f"{number}.png", "RGBA"))
        assert (found[..., 3] == 255).all()
        assert (found[..., :3] == (np.asarray(image)[..., None] if expected is None else expected)).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_values_of_image_files_have_the_channels_and_numbers_of_the_alphabet(channels, tmp_path):
    """In a rectangle of the crop; hidden colours of transparent pixels do not bleed into visible ones."""
    samples = np.random.default_rng(0).integers(0, 256, (6, 4, 4), dtype=np.uint8)
    samples[..., 3] |= 128
    samples[:3, :, 3] = 0
    Image.fromarray(samples).resize((16, 24), Image.Resampling.NEAREST).save(tmp_path / "a.png")
    alphabet = Alphabet(channels, 17)
    source = Files("files", [str(tmp_path / "a.png")], [0], [])
    source.check((6, 4), alphabet)
    values = source.cells(0, (6, 4), alphabet)
    assert (values.shape, values.dtype) == ((channels, 6, 4), torch.uint8)
    assert values.max() == 16 or channels == 4
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    expected = np.asarray(center_crop_arr(open_as(tmp_path / "a.png", mode), (6, 4))).reshape(6, 4, channels)
    assert np.array_equal(values.permute(1, 2, 0).numpy(), np.rint(expected * (16 / 255)))
    if channels == 4:
        assert not values[3, :3].any()
        assert np.abs(values.permute(1, 2, 0).numpy()[3:] - samples[3:] * (16 / 255)).max() <= 0.75
    else:
        assert (values[:, :3] == 16).all()  # white


@pytest.mark.parametrize(
    ("shape", "alphabet"),
    [
        ((8,), Alphabet(1)), ((4, 8, 8), Alphabet(3)), ((8, 8), Alphabet(2)), ((8, 8), Alphabet(3, 257)),
        ((8, 8), Alphabet(1, 2, "categorical")),
    ],
)  # fmt: skip
def test_what_image_files_cannot_be_is_one_line(shape, alphabet):
    source = Files("files", ["cat/a.png"], [0], [])
    with pytest.raises(
        UserError, match=r"^cat/a.png: an image has two axes, .* needs arrays \(docs/data.md\)$"
    ):
        ImageDataset(source, shape, alphabet, seed=0)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (3, 3), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    assert (pixels(open_as(tmp_path / "moves.gif")) == (255, 0, 0)).all()


def test_names_that_are_chinese_or_no_text_at_all(tmp_path):
    for name in ("熊猫.png".encode(), "熊猫.png".encode("gbk")):
        path = os.fsencode(tmp_path) + b"/" + name
        with open(path, "wb") as file:
            Image.new("L", (1, 1), 7).save(file, "png")
        assert (pixels(open_as(os.fsdecode(path))) == 7).all()


def png(width: int, height: int, depth: int = 8, colour: int = 0, rows: bytes = b"") -> bytes:
    """The bytes of a PNG file with the given rows, each of which begins with its filter type."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "jpeg")
    return buffer.getvalue()


BAD = {
    "zero bytes": (b"", "not an image"),
    "text": (b"not an image, whatever its name says", "not an image"),
    "truncated JPEG": (jpeg()[:2000], "image file is truncated"),
    "half a header": (png(4, 4)[:20], "cannot be read"),
    "rows missing": (png(4, 4), "image file is truncated"),
    "decompression bomb": (png(20000, 20000), "exceeds limit of .* pixels, could be decompression bomb"),
    "no width": (png(0, 4), "cannot be read"),
    "a line": (png(1, 60000, rows=bytes(120000)), "1 x 60000 pixels: too thin to crop"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_is_named_in_one_line(kind, tmp_path):
    content, reason = BAD[kind]
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path)) + ": cannot be read as an image") as error:
        open_as(path)
    assert re.search(reason, str(error.value))
    assert "\n" not in str(error.value)


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"gone.png: cannot be read as an image \(No such file or directory\)"
    ):
        open_as(tmp_path / "gone.png")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "tiff", "webp", "bmp", "ppm"])
def test_damage_anywhere_gives_an_image_or_a_user_error(kind):
    buffer, rng, refused = io.BytesIO(), np.random.default_rng(0), 0
    Image.effect_noise((40, 30), 60).convert("RGB").save(buffer, kind)
    for _ in range(100):
        content = bytearray(buffer.getvalue())
        for _ in range(rng.integers(1, 6)):
            content[rng.integers(0, min(len(content), 400))] = rng.integers(0, 256)
        try:
            assert open_as(io.BytesIO(content[: rng.integers(100, len(content))]), name="it").mode == "RGB"
        except UserError:
            refused += 1
    assert refused > 20, "the damage did not reach the decoder"
