"""demo/codec.py, called as from the command line, with a tiny model."""

import gzip

import numpy as np
import pytest
from PIL import Image

from conftest import opinionated, tiny_model
from demo import codec


@pytest.fixture(scope="module")
def rgb(tmp_path_factory) -> str:
    return saved(tiny_model("ar"), tmp_path_factory)


@pytest.fixture(scope="module")
def greys(tmp_path_factory) -> str:
    """A model of 17 greys."""
    return saved(tiny_model("ar", channels=1, num_values=17), tmp_path_factory)


def saved(model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    opinionated(model).save_pretrained(folder)
    return str(folder)


def random_image(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def refused(arguments: list[str], capsys) -> str:
    """Returns the error message of a command that must fail."""
    with pytest.raises(SystemExit) as ended:
        codec.main(arguments)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "rror" in line] == lines[-1:]
    return lines[-1]


def test_images_of_several_sizes_come_back_as_files(rgb, tmp_path, capsys):
    pixels = {"a": random_image(8, 8, 3), "b": random_image(9, 12, 3), "ä b": random_image(8, 8, 3)}
    for name, image in pixels.items():
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in pixels]
    archive, out = str(tmp_path / "new" / "x.fractal"), tmp_path / "out"
    codec.main(["encode", *files, "-o", archive, "--model", rgb, "--label", "2", "--batch", "2"])
    assert "3 images of 8 x 8 pixels, 12 x 9 pixels, " in capsys.readouterr().out
    codec.main(["decode", archive, "-o", str(out), "--model", rgb])
    for name, number in (("a", 0), ("ä b", 1), ("b", 2)):
        assert (np.asarray(Image.open(out / f"{number:05}-{name}.png")) == pixels[name]).all()
    codec.main(["decode", archive, "-o", str(tmp_path / "one"), "--model", rgb, "--only", "2"])
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["00002-b.png"]
    capsys.readouterr()
    codec.main(["stat", archive])
    lines = capsys.readouterr().out.splitlines()
    assert "bits/dim" in lines[0]
    assert [line.split("shape ")[1][:10] for line in lines[1:]] == ["(3, 8, 8),", "(3, 9, 12)"]
    assert "no array" in refused(["decode", archive, "-o", str(tmp_path / "x.npy"), "--model", rgb], capsys)


def test_arrays_and_idx_files_come_back_as_one_array(greys, tmp_path, capsys):
    values = random_image(3, 8, 8, 1) % 17
    np.save(tmp_path / "values.npy", values)
    samples = np.rint(values[..., 0] * (255 / 16)).astype(np.uint8)
    header = bytes([0, 0, 8, 3, *[0, 0, 0, 3], *[0, 0, 0, 8], *[0, 0, 0, 8]])
    with gzip.open(tmp_path / "t10k-images-idx3-ubyte.gz", "wb") as file:
        file.write(header + samples.tobytes())
    files = [str(tmp_path / name) for name in ("values.npy", "t10k-images-idx3-ubyte.gz")]
    archive, out = str(tmp_path / "x.fractal"), tmp_path / "new" / "out.npy"
    codec.main(["encode", *files, "-o", archive, "--model", greys])
    codec.main(["decode", archive, "-o", str(out), "--model", greys])
    assert (np.load(out) == np.concatenate([values, values])).all()
    codec.main(
        ["decode", archive, archive, "-o", str(tmp_path / "out"), "--model", greys, "--only", "4", "6"]
    )
    assert (np.asarray(Image.open(tmp_path / "out" / "00004.png")) == samples[1]).all()
    assert (np.asarray(Image.open(tmp_path / "out" / "00006.png")) == samples[0]).all()


def test_what_cannot_be_kept_exactly_is_refused(rgb, greys, tmp_path, capsys):
    out = str(tmp_path / "x.fractal")
    transparent = np.dstack([random_image(8, 8, 3), np.full((8, 8), 128, np.uint8)])
    for name, image, model, message in (
        ("clear.png", transparent, rgb, "transparent pixels lie over white"),
        ("colours.png", random_image(8, 8, 3), greys, "it has other colours"),
        ("greys.png", random_image(8, 8), greys, "it has other colours"),
        ("deep.png", random_image(8, 8).astype(np.uint16) * 257, rgb, "16 bits a channel are scaled to 8"),
    ):
        Image.fromarray(image).save(tmp_path / name)
        line = refused(["encode", str(tmp_path / name), "-o", out, "--model", model], capsys)
        assert f"{tmp_path / name}: " in line
        assert message in line
    Image.fromarray(random_image(8, 8)).save(tmp_path / "grey.png")  # an RGB model has all greys
    codec.main(["encode", str(tmp_path / "grey.png"), "-o", out, "--model", rgb])


def test_mistakes_are_errors_of_one_line(rgb, greys, tmp_path, capsys):
    Image.fromarray(random_image(8, 8)).save(tmp_path / "a.png")
    image, archive = str(tmp_path / "a.png"), tmp_path / "x.fractal"
    codec.main(["encode", image, "-o", str(archive), "--model", rgb])
    (tmp_path / "cut.fractal").write_bytes(archive.read_bytes()[:-3])
    np.save(tmp_path / "one.npy", random_image(8, 8, 3))
    np.save(tmp_path / "floats.npy", np.zeros((1, 8, 8, 3)))
    for arguments, message in (
        (["encode", image, "-o", "x.png"], "--output x.png: its name must end in .fractal"),
        (["encode", "nothing.png", "-o", str(archive)], "nothing.png: cannot be read"),
        (["encode", image, "-o", str(archive), "--label", "9"], "--label '9' is no class"),
        (["decode", image, "-o", "out"], f"{image}: this is no archive"),
        (["decode", "nothing", "-o", "out"], "nothing"),
        (["decode", str(tmp_path / "cut.fractal"), "-o", "out"], "cut.fractal: the archive is damaged"),
        (["decode", str(archive), "-o", "out", "--only", "1"], "--only 1 must be from 0 to 0"),
        (["decode", str(archive), "-o", "out", "--model", greys], "which the model cannot draw"),
        (["stat", image], f"{image}: this is no archive"),
        (["decode", str(archive), "-o", image], f"--output {image}"),
        (
            ["encode", str(tmp_path / "one.npy"), "-o", str(archive)],
            "one.npy: has shape (8, 8, 3); it must be",
        ),
        (
            ["encode", str(tmp_path / "floats.npy"), "-o", str(archive)],
            "its values are float64; they must be integers",
        ),
    ):
        model = [] if "--model" in arguments or arguments[0] == "stat" else ["--model", rgb]
        assert message in refused([*arguments, *model], capsys)


def test_with_force_the_images_whose_crc_fits_are_written(rgb, tmp_path, capsys):
    np.save(tmp_path / "values.npy", random_image(3, 8, 8, 3))
    archive, out = tmp_path / "x.fractal", tmp_path / "out"
    codec.main(["encode", str(tmp_path / "values.npy"), "-o", str(archive), "--model", rgb])
    damaged = bytearray(archive.read_bytes())
    damaged[-10] ^= 1  # in the stream of the last image
    archive.write_bytes(damaged)
    command = ["decode", str(archive), "-o", str(out), "--model", rgb]
    assert "CRC-32 differs" in refused(command, capsys)
    assert "1 of 3 images have another CRC-32 than they had: 2" in refused([*command, "--force"], capsys)
    assert sorted(path.name for path in out.iterdir()) == ["00000.png", "00001.png"]


def test_names_from_an_archive_stay_in_the_folder():
    assert codec.file_name("../../etc/passwd", 3) == "00003-.._.._etc_passwd"
    assert codec.file_name("a\0\n\x1b[2J" + "b" * 500, 0) == "00000-a____2J" + "b" * 93
    assert len(codec.file_name("雲" * 80, 0).encode()) < 120
