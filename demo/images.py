"""Draws the pictures of the documentation that show the bundled models, and runs the notebook.

    python demo/images.py [NAME ...]     # default: all of them, in minutes on two cores

The same models give the same pictures: demo/visual.gif, demo/edits.png, docs/likelihood.png,
docs/recursion.svg and demo/run_fractalgen.ipynb with its outputs.
"""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
import shlex
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import edit
import likelihood
import numpy as np
from animation import save_animation
from common import EXAMPLES, make_parser, save_png
from environment import ROOT
from PIL import Image, ImageColor
from recursion import UNDECIDED, draw_recursion
from torch import Tensor

from models.hub import zoo
from models.likelihood.inside import look_inside
from util.errors import UserError
from util.files import atomic_write
from util.pixels import Alphabet, make_sheet

# Of visual.gif: the classes that each model draws, two a row, and the numbers of the images, of seed 0.
GROWTH = {
    "fashion_ar": (("sneaker", "bag", "dress", "ankle boot"), (0, 1, 2, 3)),
    "emoji": (("face", "heart", "person", "flag"), (12, 42, 53, 31)),  # chosen among eleven each
}
CELL, FRAMES = 224, 60  # a multiple of 28 and of 32 px, so that all images are of one size
# Of edits.png: what is shown, and the flags of demo/edit.py.
EDITS = {
    "A sleeve painted back": "coat.png --model fashion_mar --box 0 6 9 22 --label coat",
    "A bag uncropped": "bag.png --model fashion_mar --outpaint 6 8 16 16 --label bag",
    "A pullover's lower part drawn as a T-shirt's": (
        "pullover.png --model fashion_mar --box 0 8 28 20 --label T-shirt"
    ),
}
RESULTS = 3
# Of likelihood.png: the flags of demo/likelihood.py.
LIKELIHOOD = "sneaker.png --model fashion_ar --label sneaker"
# Of recursion.svg: the model, the class, the seed and the pixel that is followed.
RECURSION = ("emoji", "face", 6, (11, 13))


def command(flags: str) -> list[str]:
    """Splits the flags of a demo, of which the first is the name of a file in examples/fashion."""
    name, *others = shlex.split(flags)
    return [str(EXAMPLES / "fashion" / name), *others]


def draw_growth(path: Path) -> None:
    """Draws images of all models of GROWTH that are bundled, side by side, and how they grew."""
    parts = [grown(name, *GROWTH[name]) for name in GROWTH if name in zoo.names()]
    if not parts:
        raise UserError(f"{path.name} shows {' and '.join(GROWTH)}, of which none is bundled here")
    frames = []
    for sheets in zip(*parts, strict=True):
        frame = Image.new("RGB", (sum(sheet.width for sheet in sheets), sheets[0].height), "white")
        for number, sheet in enumerate(sheets):
            frame.paste(sheet, (sum(before.width for before in sheets[:number]), 0))
        frames.append(frame)
    save_animation(path, frames, hold=4.0)


def grown(name: str, classes: tuple[str, ...], indices: tuple[int, ...]) -> list[Image.Image]:
    """Returns FRAMES sheets of how a bundled model draws one image of each class, pixel by pixel."""
    model, canvases = zoo.load(name), []

    def keep(step: int, num_steps: int, canvas: Tensor) -> None:
        canvases.append(canvas.clone())

    options = dict(seed=0, indices=indices, callback_on_step_end=keep, watch_levels=len(model.generators))
    model.generate(classes, progress_bar=False, **options)
    sheets = []
    for share in np.linspace(0, 1, FRAMES):
        images = with_undecided(canvases[round(share * (len(canvases) - 1))], model.alphabet)
        sheets.append(make_sheet(images, columns=2, zoom=CELL // images[0].width))
    return sheets


def with_undecided(canvas: Tensor, alphabet: Alphabet) -> list[Image.Image]:
    """Returns a canvas's images in RGB, with UNDECIDED where it holds zeros, which no pixel's value is."""
    undecided = (canvas == 0).all(1).cpu().numpy()[..., None]
    colour = np.uint8(ImageColor.getrgb(UNDECIDED))
    return [
        Image.fromarray(np.where(mask, colour, np.asarray(image.convert("RGB"))))
        for mask, image in zip(undecided, alphabet.to_pil(canvas), strict=True)
    ]


def draw_edits(path: Path) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for title, flags in EDITS.items():
            with redirect_stdout(None):  # it names the files of this folder
                edit.main([*command(flags), "--results", str(RESULTS), "-o", f"{folder}/edit.png"])
            sheet = Image.open(Path(folder) / "edit-sheet.png").convert("RGB")
            rows.append(make_sheet([sheet], columns=1, title=title))
    save_png(path, make_sheet(rows, columns=1))


def draw_likelihood(path: Path) -> None:
    likelihood.main([*command(LIKELIHOOD), "-o", str(path)])


def draw_inside(path: Path) -> None:
    name, label, seed, pixel = RECURSION
    model = zoo.load(name)
    image = model.generate(label, seed=seed, progress_bar=False)[0]
    inside = look_inside(model, image, pixel, label, seed=seed)
    with atomic_write(path, durable=False) as temporary:
        temporary.write_text(draw_recursion(image, inside, model.alphabet), encoding="utf-8")


def run_notebook(path: Path) -> None:
    """Runs a notebook and stores its outputs, without progress bars and other lines of standard error."""
    try:
        import nbclient
        import nbformat
    except ImportError as error:
        raise UserError("the notebook needs its packages: pip install -e '.[test]'") from error
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    with atomic_write(path, durable=False) as temporary:
        nbformat.write(notebook, temporary)


PICTURES = {
    "demo/visual.gif": draw_growth,
    "demo/edits.png": draw_edits,
    "docs/likelihood.png": draw_likelihood,
    "docs/recursion.svg": draw_inside,
    "demo/run_fractalgen.ipynb": run_notebook,
}


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("images.py", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    args = parser.parse_args(arguments)
    with parser.one_line_errors(OSError):
        for name in args.names:
            if name not in PICTURES:
                raise UserError(f"{name}: no picture; one of {', '.join(PICTURES)}")
        for name in args.names or PICTURES:
            PICTURES[name](ROOT / name)
            print(f"{name}: {(ROOT / name).stat().st_size / 1e3:,.0f} kB", flush=True)


if __name__ == "__main__":
    main()
