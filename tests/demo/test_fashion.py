"""The figures of demo/fashion.py and the loop of demo/speedrun.py, on small data and stand-ins."""

import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))
import fashion
import fashion_data
import speedrun

from models.fractalgen import FractalGen
from models.sampling.edit import box_mask
from util.dist import World
from util.errors import UserError

DEMO = Path(fashion.__file__).parent
# bits/dim of demo/examples/fashion, in the order of the classes
BITS = (2.3003, 1.4901, 2.3658, 1.7670, 3.5120, 2.5307, 3.1848, 2.0135, 3.4232, 2.7460)


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """IDX files: 64 training and 6 test images of 28 px, each of one grey, a step a row."""
    folder = tmp_path_factory.mktemp("idx")
    for name, n in (("train", 64), ("t10k", 6)):
        images = (
            np.repeat(np.arange(28, dtype=np.uint8)[:, None], 28, 1)[None]
            * np.arange(1, n + 1)[:, None, None]
            % 7
        )
        write_idx(folder / f"{name}-images-idx3-ubyte", images.astype(np.uint8))
        write_idx(folder / f"{name}-labels-idx1-ubyte", (np.arange(n) % 10).astype(np.uint8))
    return folder


def test_the_area_is_that_of_the_roc_curve_and_ties_count_half():
    rng = np.random.default_rng(0)
    inliers, outliers = rng.integers(0, 20, 70), rng.integers(5, 25, 90)
    truth = np.repeat([0, 1], [70, 90])
    expected = roc_auc_score(truth, np.concatenate([inliers, outliers]))
    assert fashion.area_under_curve(inliers, outliers) == pytest.approx(expected)
    assert fashion.area_under_curve(np.zeros(3), np.zeros(4)) == 0.5


def test_plain_outliers_look_likely_until_the_bits_of_a_file_are_taken_off():
    """A stand-in that needs 0.9 times a file's bits for clothes, and 1.5 times for what it does not know."""
    rng = np.random.default_rng(0)
    clothes = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8)
    plain = np.full((10, 28, 28), 7, np.uint8)
    plain[:, :6, :6] = clothes[:10, :6, :6]
    known = {image.tobytes() for image in clothes}

    def log_likelihood(images, num_orders):
        cost = [fashion.compressed_bits(x, "WEBP") * (0.9 if x.tobytes() in known else 1.5) for x in images]
        return SimpleNamespace(bits=-torch.tensor(cost))

    model = SimpleNamespace(log_likelihood=log_likelihood, num_dims=784)
    found = fashion.tell_outliers(model, clothes, {"plain": plain, "clothes": clothes})
    assert (found["plain"]["by bits"], found["plain"]["by bits minus WebP"]) == (0.0, 1.0)
    assert found["clothes"]["by bits"] == found["clothes"]["by bits minus WebP"] == 0.5


def test_views_decide_between_the_classes_that_are_nearly_likeliest_alone():
    """A class's bits are the distance to its prototype, by the image's shift and by its corner."""
    shifts = [(0, 0), *fashion.VIEWS]
    image = np.random.default_rng(0).integers(1, 256, (1, 6, 6), np.uint8)

    class Model:
        def log_likelihood(self, images, classes, **_):
            return SimpleNamespace(
                bits=torch.tensor([-self.cost[view_of(x), c] for x, c in zip(images, classes, strict=True)])
            )

    def view_of(view: np.ndarray) -> int:
        """Which of `shifts` this view of the image has: rolled, with zeros where pixels come in."""
        for number, shift in enumerate(shifts):
            rolled = np.roll(image[0], shift, (0, 1))
            for axis, by in enumerate(shift):
                if by:
                    np.moveaxis(rolled, axis, 0)[0 if by > 0 else -1] = 0
            if (view == rolled).all():
                return number
        raise AssertionError("a view that is no shift of the image")

    model = Model()
    model.cost = np.full((5, 10), 50.0)
    model.cost[0, :3] = 30, 31, 37  # the third class is too far from the first
    model.cost[1:, :3] = 30, 29.5, 0
    alone, together = fashion.classify(model, image)
    assert (alone.tolist(), together.tolist()) == ([0], [1])
    model.cost[0, 2] = 35
    assert fashion.classify(model, image)[1].tolist() == [2]


def test_the_report_leaves_out_what_is_measured_of_exact_models_only(capsys):
    found = {
        "bits_per_dim": {"this model": 3.0},
        "samples": {"real images read right": 0.9, "read as asked": 0.95, "of each class": {"bag": 1.0}},
        "distance to the nearest training image": {"samples": 30.0, "test images": 31.0},
    }
    fashion.report(found)
    assert "by likelihood" not in capsys.readouterr().out
    shares = {"by the image": 0.8628, "by five views": 0.8862}
    fashion.report({**found, "classified by likelihood": shares})
    assert "by likelihood, by five views: 88.62%" in capsys.readouterr().out


def test_the_sheets_have_a_row_for_each_class(tmp_path):
    samples = [Image.fromarray(np.full((28, 28), i, np.uint8)) for i in range(100)]
    clothes = np.arange(5, dtype=np.uint8)[:, None, None] * np.ones((1, 28, 28), np.uint8)
    fashion.draw_sheets(samples, np.zeros((100, 3), int), clothes, tmp_path)
    for name in ("samples.png", "nearest.png"):
        assert Image.open(tmp_path / name).height >= 10 * 2 * 28


def test_a_folder_without_idx_files_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no IDX files; give --data_path"):
        fashion_data.read_fashion(tmp_path, "val")


def test_the_speedrun_trains_the_averaged_weights_that_it_measures(data, monkeypatch, capsys):
    for name, value in dict(SIZES=(28, 4, 1), WIDTHS=(16, 16, 16), BATCH=4, STEPS=2).items():
        monkeypatch.setattr(speedrun, name, value)
    found = []
    for speedrun.STEPS in (2, 16):
        speedrun.measure(data)
        printed = capsys.readouterr().out
        assert "exact, of 6 test images" in printed
        found.append(float(printed.split(" minutes, ")[1].split()[0]))
    assert found[1] < found[0] - 0.1
    assert "3.0 bits/dim is missed" in printed
    assert isinstance(speedrun.train(data, 1, World()), FractalGen)


def test_the_rate_of_the_speedrun_rises_stays_and_falls_to_zero():
    assert [speedrun.learning_rate(x) / speedrun.RATE for x in (0, 0.02, 0.04, 0.3)] == pytest.approx(
        [0, 0.5, 1, 1]
    )
    assert [speedrun.learning_rate(x) / speedrun.RATE for x in (0.65, 1)] == pytest.approx([0.5, 0])


@pytest.mark.parametrize("kind", ["ar", "mar"])
def test_a_bundled_model_is_small_and_its_card_has_its_settings_and_licence(kind):
    folder = DEMO / f"fashion_{kind}_model"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8e6
    model = FractalGen.from_pretrained(folder)
    assert model.class_names == fashion_data.CLASSES
    assert model.about.data == fashion.TRAINED_ON
    options = model.sampling_defaults
    assert {name: getattr(options, name) for name in fashion.DEFAULTS[kind]} == fashion.DEFAULTS[kind]
    card = (folder / "README.md").read_text(encoding="utf-8")
    for text in (f"guidance {options.guidance_scale:g}", f"temperature {options.temperature:g}", "Zalando"):
        assert text in card


def held_out() -> list[Image.Image]:
    return [
        Image.open(DEMO / "examples" / "fashion" / f"{name.lower()}.png") for name in fashion_data.CLASSES
    ]


def test_the_ar_model_gives_held_out_clothes_their_known_bits_and_classes():
    model = FractalGen.from_pretrained(DEMO / "fashion_ar_model")
    bits = -model.log_likelihood(held_out(), num_orders=1, progress_bar=False).bits / model.num_dims
    assert bits.tolist() == pytest.approx(BITS, abs=1e-3)
    assert model.classify(held_out(), num_orders=1, progress_bar=False).argmax(1).tolist() == list(range(10))


def test_the_mar_model_paints_a_sleeve_back_and_keeps_the_known_pixels():
    model = FractalGen.from_pretrained(DEMO / "fashion_mar_model")
    coat, hidden = held_out()[4], box_mask(28, (0, 6, 9, 22)).numpy()
    (result,) = model.edit(coat, hidden, "coat", seed=0, num_inference_steps=(16, 4), progress_bar=False)
    before, after = np.asarray(coat), np.asarray(result)
    assert (before[~hidden] == after[~hidden]).all()
    sleeve = hidden & (before > 100)
    assert (after[sleeve] > 100).mean() > 0.8  # there is cloth where cloth was
    assert (after[hidden & (before == 0)] < 50).mean() > 0.8
