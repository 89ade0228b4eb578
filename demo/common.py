"""Parts that several demos share: flags, image files, and runs of main_fractalgen.py."""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from environment import ROOT
from PIL import Image

from models.hub.zoo import DEFAULT, names
from util.crop import center_crop_arr
from util.data.decode import open_as
from util.errors import UserError
from util.files import atomic_write, check_writable
from util.flags import Parser
from util.inputs import open_image

EXAMPLES = ROOT / "demo" / "examples"  # real images that no bundled model was trained on


def make_parser(script: str, description: str) -> Parser:
    """Returns a parser that prints `description` as it is written and reports an error in one line."""
    return Parser(script, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="default: the accelerator that torch finds, else cpu")


def add_model_flags(parser: argparse.ArgumentParser, default: str = DEFAULT) -> None:
    """Adds --model and --device, as `models.hub.zoo.load` takes them."""
    parser.add_argument(
        "--model",
        default=default,
        help=f"a bundled model ({', '.join(names())}; default: {default}), a folder that save_pretrained or "
        "training wrote, an id on the Hugging Face hub, or the name of a published model, whose weights are "
        "then downloaded",
    )
    add_device_flag(parser)


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Returns the `type` of a flag that takes a whole number from `low` to `high`; None: of any size."""

    def number(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value

    number.__name__ = "whole number"  # argparse shows it
    return number


def image_size(model, square: bool = False) -> tuple[int, int]:
    """Returns width and height of a model's images. Raises UserError where they are none, or no squares."""
    if not model.alphabet.is_image(model.image_shape):
        raise UserError("this model draws no images; use model.generate, see docs/other-data.md")
    height, width = model.image_shape
    if square and (height != width or model.alphabet.channels == 4):
        raise UserError("only square images without transparency can be shown here; use model.edit")
    return width, height


def one_or_list(numbers: list[float] | None) -> float | list[float] | None:
    """Returns the only number of a list, or the list if there are several."""
    return numbers[0] if numbers is not None and len(numbers) == 1 else numbers


def check_output(flag: str, path: Path, *endings: str) -> None:
    """Raises UserError unless the file can be written and its name ends in one of `endings`, such as ".png".

    It makes the file's folder. Demos call it before the work.
    """
    if path.suffix.lower() not in endings:
        raise UserError(f"{flag} {path}: its name must end in {' or '.join(endings)}")
    check_writable(path, f"{flag} {path}")


def read_image(path: Path, reader: Callable[[Path], tuple[Image.Image, str]] = open_image) -> Image.Image:
    """Returns an image as `open_image` or `open_mask` reads it, and prints the line that they return."""
    image, line = reader(path)
    if line:
        print(line)
    return image


def crop_and_scale(image: Image.Image, side: int, path: Path) -> Image.Image:
    """Returns the image with `side` x `side` pixels; prints a line that names `path` if that changes it."""
    if image.size == (side, side):
        return image
    print(f"{path} ({image.width} x {image.height}) was cropped and scaled to {side} x {side}")
    return center_crop_arr(image, side)


def save_png(path: Path, image: Image.Image) -> None:
    """Writes a PNG file by an atomic write, and makes its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, durable=False) as temporary:
        image.save(temporary, "PNG")


def run_main(flags: str, capture: bool = False, quiet: bool = False, **paths: Path) -> str | None:
    """Prints a command line of main_fractalgen.py and runs it in a process of its own.

    flags    flags and values, separated by blanks
    paths    flags whose values are absolute paths, such as output_dir=Path("/tmp/run")
    capture  whether to return what the command prints on its standard output, instead of showing it
    quiet    whether to show neither the command line nor, unless it fails, its standard error

    Exits with the command's status if the command fails.
    """
    words = ["main_fractalgen.py", *flags.split()]
    for name, path in paths.items():
        words += [f"--{name}", from_root(path)]
    if not quiet:
        print(shell_command(words), flush=True)
    result = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        check=False,
        stdout=subprocess.PIPE if capture else None,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
    )
    if result.returncode:
        print(result.stderr or "", end="", file=sys.stderr)
        raise SystemExit(result.returncode)
    return result.stdout


def from_root(path: str | Path) -> str:
    """Returns the path relative to the repository's root, or as it is if it leads elsewhere."""
    path = Path(path)
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def shell_command(words: Sequence[str], width: int = 100) -> str:
    """Returns a Python script and its flags as a command for a shell whose folder is the repository's root.

    The command is broken into lines of at most `width` characters, each of which begins with a flag.
    """
    python = from_root(sys.executable)
    parts = ["python" if Path(python).is_absolute() else shlex.quote(python)]
    for word in words:
        if word.startswith("--"):
            parts.append(word)
        else:
            parts[-1] += f" {shlex.quote(word)}"
    lines = parts[:1]
    for part in parts[1:]:
        if len(f"{lines[-1]} {part} \\") <= width:
            lines[-1] += f" {part}"
        else:
            lines.append(f"    {part}")
    return " \\\n".join(lines)


def read_split(folder: Path, mode: str = "RGB") -> tuple[np.ndarray, np.ndarray]:
    """Reads all images folder/CLASS/*.png, which must have one size, in Pillow's `mode`.

    Returns uint8 images (n, side, side, 3), or (n, side, side) in mode "L", and labels (n,): numbers of the
    classes in alphabetical order.
    Raises UserError where there are none, or one cannot be read or has another size.
    """
    paths = sorted(folder.glob("*/*.png"))
    if not paths:
        raise UserError(f"{folder}: there are no images CLASS/*.png in this folder")
    classes = sorted({path.parent.name for path in paths})
    images = []
    for path in paths:
        images.append(np.asarray(open_as(path, mode)))
        if images[-1].shape != images[0].shape:
            raise UserError(f"{path}: is not of the size of {paths[0]}; all images must have one size")
    return np.stack(images), np.array([classes.index(path.parent.name) for path in paths])


def plot_curve(log: Path, title: str, output: Path) -> None:
    """Plots training loss and validation bits per dimension, from a run's log.txt, into an image file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in log.read_text().splitlines()]
    _, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, label, style in (
        ("train/loss", "training loss, nats (weighted)", "-"),
        ("val/bits_per_dim", "validation, bits/dim", "o-"),
    ):
        points = [(record["step"], record[name]) for record in records if name in record]
        axis.plot(*zip(*points, strict=True), style, label=label)
    axis.set(xlabel="step", yscale="log", title=title)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    pyplot.savefig(output, dpi=110)
