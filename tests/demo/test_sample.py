"""demo/sample.py writes what `generate` draws, takes classes by name or number, and has one-line errors."""

import sys
from pathlib import Path

import animation
import numpy as np
import pytest
from PIL import Image

from conftest import opinionated, tiny_model
from models.hub.classes import class_title
from util.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))
import sample

NAMES = ("face", "red heart", "Face", "cat")


@pytest.fixture(scope="module")
def model():
    model = opinionated(tiny_model("guided"))
    model.class_names = NAMES
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    model.save_pretrained(path)
    return path


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_sheet_folders_and_growth_show_what_generate_draws(model, folder, tmp_path, capsys):
    out = tmp_path / "new"
    command = (
        f"--model {folder} --num 3 --seed 5 --cfg 2 --batch 4 --zoom 2 --device cpu --sheet {out}/sheet.png"
    )
    command += f" --growth {out}/growth.gif {out}/growth.mp4 --folders {out}/f --classes"
    sample.main([*command.split(), "red heart", "3"])
    drawn = model.generate(
        [1, 1, 1, 3, 3, 3], seed=5, guidance_scale=2.0, output_type="np", progress_bar=False
    )
    names = [f"0001 red heart/{number:04d}.png" for number in range(3)] + [
        f"0003 cat/{number:04d}.png" for number in range(3)
    ]
    assert [str(path.relative_to(out / "f")) for path in sorted(out.glob("f/*/*"))] == names
    assert all((pixels(out / "f" / name) == image).all() for name, image in zip(names, drawn, strict=True))
    sheet = pixels(out / "sheet.png")
    assert (sheet[18 : 18 + 16 : 2, -(16 + 2) : -2 : 2] == drawn[5]).all()  # second row, last column
    growth = Image.open(out / "growth.gif")
    assert growth.n_frames == model.sampling_defaults.num_inference_steps[0]
    growth.seek(growth.n_frames - 1)
    # The fourth image, which is the last of the first batch.
    shown = np.asarray(growth.convert("RGB")).astype(int)[18:34:2, -54:-38:2]
    assert np.abs(shown - drawn[3]).mean() < 12  # 256 colours
    assert sorted(path.name for path in out.iterdir()) == ["f", "growth.gif", "growth.mp4", "sheet.png"]
    assert "6 images of 8 x 8 pixels, seed 5" in capsys.readouterr().out


def test_mp4_can_be_read_back(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="pip install -e '.[demo]'")
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    frames = [Image.new("RGB", (33, 17), colour) for colour in colours]
    animation.save_animation(tmp_path / "a.mp4", frames, fps=10, hold=0.5)
    about, *found = ffmpeg.read_frames(tmp_path / "a.mp4")
    assert (about["codec"], about["size"], len(found)) == ("h264", (34, 18), 3 + 5)
    found = [np.frombuffer(frame, np.uint8).reshape(18, 34, 3) for frame in found]
    assert np.abs(np.array([frame.mean((0, 1)) for frame in found[:3]]) - colours).max() < 15


def test_without_ffmpeg_one_line_says_what_to_install_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UserError, match=r"pip install 'fractalgen\[demo\]'"):
        animation.save_animation(tmp_path / "a.mp4", [Image.new("RGB", (4, 4))])
    assert not list(tmp_path.iterdir())


BAD = {
    "--cfg 0.5": "--cfg 0.5 must be a finite number from 1",
    "--cfg inf": "--cfg inf must be a finite number from 1",
    "--temperature inf": "--temperature inf must be a finite number above 0",
    "--sheet a.jpg": "--sheet a.jpg: its name must end in .png",
    "--folders /": "--folders /: this folder is not empty",
    "--num_iter_list 4": "--num_iter_list 4 must be 2 numbers, the steps of each level",
    "--classes dog": "--classes 'dog' is no class of the model; give one of its names or a number from 0 to 3",
    "--classes 4": "--classes '4' is no class",
    "--classes FACE": "--classes 'FACE' may be 0 or 2",
    "--growth a.avi": ".gif or .mp4",
    "--seed -1": "--seed -1 must be from 0",
    "--device cuda:77": "cuda:77",
    "--sheet /proc/nowhere/a.png": "--sheet /proc/nowhere/a.png: cannot be written (No such file or directory)",
    "--num 0": "must be at least 1",
    "--zoom 1000000": "give a smaller --zoom or --num",
    "--num 100000000": "the sheet of 400000000 images would have",
    "--growth /proc/nowhere/a.gif": "--growth /proc/nowhere/a.gif: cannot be written (No such file or directory)",
    "--folders /proc/nowhere": "--folders /proc/nowhere: cannot be written (No such file or directory)",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_ends_in_one_line(flags, folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        sample.main(f"--model {folder} --num 1 --device cpu --sheet {tmp_path}/a.png {flags}".split())
    error = [line for line in capsys.readouterr().err.splitlines() if "sampling" not in line]
    assert (ended.value.code, len(error)) == (2, 1)
    assert BAD[flags] in error[0]
    assert not list(tmp_path.iterdir())


def test_outputs_that_cannot_be_written_are_refused_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "load", None)
    for flags in ("--sheet /proc/x/a.png", "--growth /proc/x/a.gif", "--folders /proc/x"):
        with pytest.raises(SystemExit, match="2"):
            sample.main(f"--sheet {tmp_path}/a.png {flags}".split())
        assert f"{flags}: cannot be written" in capsys.readouterr().err


def test_a_lack_of_memory_is_reported_in_one_line(folder, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(sample, "draw", fail)
    with pytest.raises(SystemExit):
        sample.main(f"--model {folder} --num 1 --device cpu --sheet {tmp_path}/a.png".split())
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert "out of memory; give a smaller --batch, or --chunk" in error[0]


def test_the_title_of_a_class():
    assert (class_title(1, None), class_title(1, NAMES)) == ("class 1", "red heart")
