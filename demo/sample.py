"""Draws images from a model: a sheet of them, an animation of the growing canvas, a folder for each class.

    python demo/sample.py --classes face heart --num 8 --growth output/growth.gif
    python demo/sample.py --model fractalmar_in64 --classes "golden retriever" 387 --folders output/dogs

Images are written as PNG. A setting that is left out has the model's default value.
"""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from animation import Growth, check_can_write, save_animation
from common import ROOT, add_model_flags, check_output, image_size, make_parser, save_png, whole_number
from PIL import Image

from models.hub.classes import class_title
from models.hub.zoo import load
from models.sampling.generate import is_out_of_memory
from models.sampling.guidance import SCHEDULES
from models.sampling.labels import check_labels
from models.sampling.options import FLAGS
from util.errors import UserError, naming
from util.files import check_writable
from util.flags import TEMPERATURE, Parser
from util.pixels import make_sheet


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


positive = whole_number(1)
MAX_PIXELS = 2**28  # of a sheet: 768 MiB of memory


def get_parser() -> Parser:
    parser = make_parser("sample.py", __doc__)
    add_model_flags(parser)
    parser.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="names or numbers; default: all, at most the first 10"
    )
    parser.add_argument("--num", type=positive, default=8, help="images of each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cfg", type=float, help="guidance scale")
    parser.add_argument("--cfg_schedule", choices=SCHEDULES)
    parser.add_argument("--temperature", type=float, help=TEMPERATURE)
    parser.add_argument(
        "--num_iter_list", type=numbers, help="steps of each level above the pixel, such as 64,16"
    )
    parser.add_argument(
        "--batch", type=positive, default=64, help="images drawn together; --growth shows the first batch"
    )
    parser.add_argument(
        "--chunk", type=positive, help="patches of a deeper level drawn together; fewer need less memory"
    )
    output = ROOT / "output" / "samples.png"
    parser.add_argument("--sheet", type=Path, default=output, help="has a row for each class")
    parser.add_argument(
        "--growth", type=Path, nargs="+", default=[], metavar="FILE", help=".gif, .mp4, or both"
    )
    parser.add_argument(
        "--levels", type=positive, default=1, help="--growth shows the steps of this many levels"
    )
    parser.add_argument("--fps", type=positive, default=12, help="frames per second of --growth")
    parser.add_argument(
        "--folders", type=Path, metavar="FOLDER", help="write FOLDER/CLASS/0000.png and so on"
    )
    parser.add_argument(
        "--zoom",
        type=positive,
        help="of --sheet and --growth; default: so that an image has at least 96 pixels a side",
    )
    return parser


def settings_of(args: argparse.Namespace) -> dict:
    """Returns the settings for `model.generate`; None stands for the model's default."""
    return dict(
        guidance_scale=args.cfg,
        guidance_schedule=args.cfg_schedule,
        temperature=args.temperature,
        num_inference_steps=args.num_iter_list,
        seed=args.seed,
        chunk=args.chunk,
        watch_levels=args.levels,
    )


def draw(
    model, labels: Sequence[int | None], settings: dict, batch: int, growth: Growth | None
) -> list[Image.Image]:
    """Draws an image for each label, `batch` at a time. The labels are None if the model has no classes."""
    images = []
    for start in range(0, len(labels), batch):
        some = labels[start : start + batch]
        images += model.generate(
            None if some[0] is None else some,
            num_images=len(some),
            indices=range(start, start + len(some)),
            callback_on_step_end=growth if start == 0 else None,
            **settings,
        )
    return images


def write_folders(
    folder: Path,
    images: Sequence[Image.Image],
    labels: Sequence[int | None],
    class_names: Sequence[str] | None,
) -> None:
    """Writes the images of each class as folder/CLASS/0000.png and so on."""
    counts: dict[Path, int] = {}
    for image, label in zip(images, labels, strict=True):
        if label is None:
            name = "images"
        elif class_names is None:
            name = f"{label:04d}"
        else:
            name = f"{label:04d} {class_names[label]}"
        class_folder = folder / re.sub(r"[^\w ,.'-]", "_", name)
        number = counts.get(class_folder, 0)
        save_png(class_folder / f"{number:04d}.png", image)
        counts[class_folder] = number + 1


def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.one_line_errors():
        try:
            run(args)
        except OSError as error:
            raise UserError(f"{error.filename or 'output'}: {error.strerror or error}") from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError("out of memory; give a smaller --batch, or --chunk") from error


def run(args: argparse.Namespace) -> None:
    check_outputs(args)
    model = load(args.model, args.device)
    if args.classes:
        classes = check_labels(model, args.classes, "--classes")
    else:
        classes = list(range(min(10, model.class_num))) or [None]
    width, height = image_size(model)
    zoom = args.zoom or max(1, -(-96 // width))
    count = len(classes) * args.num
    if (pixels := count * height * width * zoom**2) > MAX_PIXELS:
        raise UserError(
            f"the sheet of {count} images would have {pixels:,} pixels, more than {MAX_PIXELS:,}; "
            "give a smaller --zoom or --num"
        )
    labels = [label for label in classes for _ in range(args.num)]
    growth = Growth(model.alphabet, args.num, zoom) if args.growth else None
    with naming({**FLAGS, "seed": "--seed"}):
        images = draw(model, labels, settings_of(args), args.batch, growth)
    row_labels = [] if classes == [None] else [class_title(label, model.class_names) for label in classes]
    save_png(args.sheet, make_sheet(images, args.num, zoom, row_labels))
    written = [args.sheet]
    if args.folders:
        write_folders(args.folders, images, labels, model.class_names)
        written.append(args.folders)
    for path in args.growth:
        save_animation(path, growth.frames, args.fps)
        written.append(path)
    about = f"{len(images)} images of {width} x {height} pixels, seed {args.seed}"
    print(f"{about}: {', '.join(map(str, written))}")


def check_outputs(args: argparse.Namespace) -> None:
    """Raises UserError for an output that cannot be written, or whose folder holds other files."""
    for path in args.growth:
        check_can_write(path)
        check_output("--growth", path, ".gif", ".mp4")
    check_output("--sheet", args.sheet, ".png")
    if args.folders:
        if args.folders.is_dir() and any(args.folders.iterdir()):
            raise UserError(f"--folders {args.folders}: this folder is not empty; give a new one")
        check_writable(args.folders / "0000.png", f"--folders {args.folders}")


if __name__ == "__main__":
    main()
