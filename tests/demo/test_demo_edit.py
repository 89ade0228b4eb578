"""demo/edit.py and demo/likelihood.py, called as from the command line, with a tiny model."""

import numpy as np
import pytest
from PIL import Image

from conftest import opinionated, random_values, tiny_model
from demo import edit, likelihood
from models.hub import zoo
from models.hub.about import About


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    built = opinionated(tiny_model("guided"))
    built.class_names = ["Cat", "dog", "tree", "golden retriever"]
    built.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def image(tmp_path):
    """Returns a function that writes an image of random pixels and returns its path and pixels."""

    def write(width: int, height: int, name: str = "in.png"):
        pixels = random_values(1, max(width, height))[0, :, :height, :width].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / name)
        return str(tmp_path / name), pixels

    return write


def pixels_of(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def refused(main, arguments, capsys) -> str:
    """Returns the error message of a command that must fail."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    return lines[-1]


def test_a_box_a_mask_and_the_rest_around_a_box(model, image, tmp_path):
    path, pixels = image(8, 8)
    mask = np.zeros((8, 8), bool)
    mask[2:5, 1:7] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    out = str(tmp_path / "new" / "out.png")
    drawn = []
    for what in (["--box", "1", "2", "6", "3"], ["--mask", str(tmp_path / "mask.png")]):
        edit.main([path, *what, "--label", "Golden Retriever", "--model", model, "-o", out])
        drawn.append(pixels_of(out))
        assert (drawn[-1] == pixels)[~mask].all()
    assert (drawn[0] == drawn[1]).all()
    edit.main([path, "--outpaint", "1", "2", "6", "3", "--model", model, "-o", out, "--cfg", "1"])
    assert (pixels_of(out) == pixels)[mask].all()
    assert (pixels_of(out) != pixels)[~mask].mean() > 0.8


def test_several_results_and_a_sheet(model, image, tmp_path):
    path, pixels = image(8, 8)
    out = tmp_path / "out.png"
    flags = "--box 0 0 8 4 --results 2 --grey --label 1"
    edit.main([path, *flags.split(), "--model", model, "-o", str(out)])
    first, second = pixels_of(tmp_path / "out-1.png"), pixels_of(tmp_path / "out-2.png")
    assert (first != second).any()
    assert (first[:4] == first[:4, :, :1]).all()
    assert (first[4:] == pixels[4:]).all()
    sheet = pixels_of(tmp_path / "out-sheet.png")
    assert sheet.shape[1] >= 4 * 160  # image, mask and two results
    captions = sheet[160:]
    assert all((captions[:, i * 162 : (i + 1) * 162] < 99).any() for i in range(4))
    magenta = (sheet[:160] == (255, 0, 255)).all(-1)
    edge, filled = magenta[:, :160], magenta[:, 162:322]
    assert filled.sum() == 160 * 80
    assert (edge[0, :].all(), edge[79, :].all(), edge[80, :].any(), edge[40, 80]) == (
        True,
        True,
        False,
        False,
    )
    assert not magenta[:, 324:].any()
    assert not out.exists()


def test_other_sizes_are_cropped_with_their_mask(model, image, tmp_path, capsys):
    path, _ = image(40, 20)
    out = str(tmp_path / "out.png")
    edit.main([path, "--box", "12", "2", "6", "6", "--model", model, "-o", out])
    assert pixels_of(out).shape == (8, 8, 3)
    printed = capsys.readouterr().out
    assert "in.png (40 x 20) was cropped and scaled to 8 x 8" in printed
    # x 12 to 18 of the image is 0.8 to 3.2 of the model's pixels, y 2 to 8 as well
    assert "--box 12 2 6 6 is 0 0 4 4 of these 8 x 8 pixels\n" in printed
    assert "16 of 64 pixels repainted" in printed


@pytest.mark.parametrize(
    ("arguments", "line", "repainted"),
    [
        (
            "--box 0 0 20 10",
            "--box 0 0 20 10 is 0 0 4 4 of these 8 x 8 pixels; the rest was cropped away",
            16,
        ),
        (
            "--box 0 0 40 20",
            "--box 0 0 40 20 is 0 0 8 8 of these 8 x 8 pixels; the rest was cropped away",
            64,
        ),
        ("--box 10 0 20 20", "--box 10 0 20 20 is 0 0 8 8 of these 8 x 8 pixels\n", 64),
        ("--outpaint 12 2 6 6", "--outpaint 12 2 6 6 is 1 1 2 2 of these 8 x 8 pixels\n", 60),
    ],
)
def test_a_box_is_in_pixels_of_the_image_that_is_given(
    model, image, tmp_path, capsys, arguments, line, repainted
):
    """--box repaints what it touches, and --outpaint keeps what it covers."""
    path, _ = image(40, 20)
    edit.main(
        [path, *arguments.split(), "--model", model, "-o", str(tmp_path / "out.png"), "--num_iter", "1"]
    )
    printed = capsys.readouterr().out
    assert line in printed
    assert f"{repainted} of 64 pixels repainted" in printed


def test_within_bounds_the_change_of_values(model, image, tmp_path):
    path, pixels = image(8, 8)
    out = str(tmp_path / "out.png")
    edit.main([path, "--box", "0", "0", "8", "8", "--model", model, "-o", out, "--within", "9"])
    assert np.abs(pixels_of(out) - pixels).max() == 9


def test_a_mask_outside_the_crop_is_named(model, image, tmp_path, capsys):
    path, _ = image(40, 20)
    out = tmp_path / "out.png"
    mask = Image.new("L", (40, 20))
    mask.paste(255, (0, 0, 4, 4))
    mask.save(tmp_path / "mask.png")
    for what, message in (
        ("--box 0 0 4 4", "--box 0 0 4 4 leaves no pixel of the model's 8 x 8; the crop keeps 10 0 20 20"),
        ("--outpaint 12 2 2 2", "--outpaint 12 2 2 2 leaves no pixel of the model's 8 x 8"),
        ("--outpaint 0 0 40 20", "nothing to repaint: --outpaint keeps the whole image"),
        (f"--mask {tmp_path}/mask.png", "mask.png: nothing to repaint, all that is white was cropped away"),
    ):
        assert message in refused(edit.main, [path, *what.split(), "--model", model, "-o", str(out)], capsys)
        assert not out.exists()


def test_a_mask_that_is_white_everywhere_is_said_and_obeyed(model, image, tmp_path, capsys):
    path, _ = image(8, 8)
    Image.new("L", (8, 8), 255).save(tmp_path / "white.png")
    out = str(tmp_path / "out.png")
    edit.main([path, "--mask", str(tmp_path / "white.png"), "--model", model, "-o", out, "--num_iter", "1"])
    printed = capsys.readouterr().out
    assert "white.png is white everywhere: all is repainted, nothing of the image is kept" in printed
    assert "64 of 64 pixels repainted" in printed


@pytest.mark.parametrize("demo", [edit, likelihood])
def test_a_transparent_image_lies_over_white_and_a_line_says_so(demo, model, tmp_path, capsys):
    image = Image.new("RGBA", (8, 8), (9, 9, 9, 0))
    image.save(tmp_path / "clear.png")
    out, path = tmp_path / "out.png", str(tmp_path / "clear.png")
    flags = "--box 0 0 4 4" if demo is edit else "--classes 0 --num_orders 1"
    demo.main([path, *flags.split(), "--model", model, "-o", str(out), "--num_iter", "1"])
    assert f"{path}: transparent pixels lie over white\n" in capsys.readouterr().out
    if demo is edit:
        assert (pixels_of(out)[4:] == 255).all()


def test_uncrop_places_the_image_and_a_palette_bounds_the_colours(model, image, tmp_path, capsys):
    path, pixels = image(4, 4)
    out = str(tmp_path / "out.png")
    edit.main(
        [path, "--uncrop", "3", "1", "4", "--model", model, "-o", out, "--palette", "000000", "#ff8800"]
    )
    assert "scaled" not in capsys.readouterr().out
    drawn = pixels_of(out)
    assert (drawn[1:5, 3:7] == pixels).all()
    drawn[1:5, 3:7] = 0
    assert {tuple(colour) for row in drawn for colour in row.tolist()} == {(0, 0, 0), (255, 136, 0)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--box", "5", "0", "4", "4"], "--box 5 0 4 4 (x, y, width, height) is not within the 8 x 8 pixels"),
        (
            ["--uncrop", "5", "0", "4"],
            "--uncrop 5 0 4 4 (x, y, width, height) is not within the 8 x 8 pixels",
        ),
        (
            ["--box", "0", "0", "4", "4", "--label", "horse"],
            "--label 'horse' is no class of the model; give one of its names or a number from 0 to 3",
        ),
        (
            ["--box", "0", "0", "4", "4", "--label", "4"],
            "--label '4' is no class of the model; give one of its names or a number from 0 to 3",
        ),
        (
            ["--box", "0", "0", "4", "4", "--palette", "red"],
            "--palette red: colours are RRGGBB, such as ff8800",
        ),
        (["--box", "0", "0", "4", "4", "--within", "300"], "--within 300 must be from 0 to 255"),
        (["--box", "0", "0", "4", "4", "--num_iter", "4", "4", "4"], "--num_iter 4,4,4 must be 2 numbers"),
        (["--box", "0", "0", "4", "4", "-o", "x.jpg"], "-o x.jpg: its name must end in .png"),
        (
            ["--mask", "black.png"],
            "--mask black.png is black everywhere: nothing to repaint, no pixel is white",
        ),
        (["--mask", "in.png"], "mask is not binary"),
        (["--mask", "none.png"], "none.png: cannot be read as an image (No such file"),
        (["--box", "0", "0", "4", "4", "--results", "100000000"], "100000000 must be from 1 to 1000"),
        ([], "one of the arguments --mask --box --outpaint --uncrop is required"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    model, image, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    path, _ = image(8, 8)
    Image.new("L", (8, 8)).save("black.png")
    before = sorted(tmp_path.iterdir())
    line = refused(edit.main, [path, *arguments, "--model", model], capsys)
    assert message in line
    assert line.startswith("edit.py: error: ")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("demo", [edit, likelihood])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(demo, image, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load", None)
    arguments = [image(8, 8)[0], "-o", "/proc/x/out.png", *(["--box", "0", "0", "4", "4"] * (demo is edit))]
    assert "-o /proc/x/out.png: cannot be written (No such file" in refused(demo.main, arguments, capsys)


def test_a_lack_of_memory_is_reported_in_one_line(model, image, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(edit, "prepare", fail)
    path, _ = image(8, 8)
    arguments = [path, "--box", "0", "0", "4", "4", "--model", model, "-o", str(tmp_path / "out.png")]
    assert "out of memory; give fewer --results" in refused(edit.main, arguments, capsys)


def test_a_likelihood_sheet_and_its_table(model, image, tmp_path, capsys):
    path, _ = image(8, 8)
    out = str(tmp_path / "out.png")
    likelihood.main(
        [path, "--label", "tree", "--model", model, "-o", out, "--num_orders", "2", "--num_iter", "4", "2"]
    )
    printed = capsys.readouterr().out
    total = float(printed.split(" bits")[0])
    parts = dict(
        line.rsplit(" bits", 1)[0].rsplit(maxsplit=1)
        for line in printed.splitlines()
        if line.startswith("  ") and " bits" in line
    )
    parts = {name.strip(): float(bits) for name, bits in parts.items()}
    assert parts["guiding pixels of level 1"] + parts["pixels"] == pytest.approx(total, abs=0.2)
    assert parts["R"] + parts["G"] + parts["B"] == pytest.approx(total, abs=0.2)
    assert "class 2 (tree)" in printed
    shares = [
        float(line.split("%")[0])
        for line in printed.split("most probable classes")[1].splitlines()
        if "%" in line
    ]
    assert sum(shares) == pytest.approx(100, abs=0.1)
    assert shares == sorted(shares, reverse=True)
    assert Image.open(out).width > 3 * 256


def test_likelihood_refuses_in_one_line(model, tmp_path, capsys):
    assert "No such file" in refused(likelihood.main, [str(tmp_path / "none.png"), "--model", model], capsys)


@pytest.mark.parametrize("unlike", [True, False])
def test_an_image_unlike_the_training_images_is_named_and_edited(model, image, tmp_path, capsys, unlike):
    folder = tmp_path / "model"
    built = zoo.load(model, "cpu")
    built.about = About("emoji", "Draws emoji.", 1.0 if unlike else 100.0, 0.5)
    built.save_pretrained(folder)
    path, _ = image(8, 8)
    edit.main([path, "--box", "0", "0", "4", "4", "--model", str(folder), "-o", str(tmp_path / "out.png")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "unlike what the model" in line]
    assert len(lines) == unlike
    assert all(line.startswith(f"{path}: ") and "trained on, emoji, " in line for line in lines)
    assert (tmp_path / "out.png").exists()


def test_images_of_any_size_are_large_on_the_sheet(tmp_path):
    for side in (8, 32, 100, 256):
        given = Image.new("RGB", (side, side), "white")
        edit.write(tmp_path / "out.png", given, np.zeros((side, side), bool), [given])
        sheet = pixels_of(tmp_path / "out-sheet.png")
        width = sheet.shape[1] / 3
        assert width >= 160
