"""Images from a model: a sheet, the growth of the canvas as GIF or MP4, a folder for each class.

    python demo/sample.py --classes face heart --num 8 --growth output/growth.gif
    python demo/sample.py --model fractalmar_in64 --classes "golden retriever" 387 --folders output/dogs

--model is a folder that save_pretrained wrote, an id on the Hugging Face hub, or a published model's name, whose weights
are fetched. Images are PNG. What is left out is the model's best published setting.
"""

import argparse
import re
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from animation import Growth, save_animation  # noqa: E402

from models.hub import zoo  # noqa: E402  needs the path above when the package is not installed
from models.hub.classes import class_title, find_class  # noqa: E402
from models.sampling.generate import is_out_of_memory, validate_num_iters  # noqa: E402
from models.sampling.guidance import SCHEDULES, Guidance  # noqa: E402
from util.errors import UserError  # noqa: E402
from util.files import atomic_write  # noqa: E402
from util.flags import Parser  # noqa: E402
from util.pixels import make_sheet  # noqa: E402


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "demo/sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=str(zoo.BUNDLED), help="default: the bundled model, demo/emoji_model"
    )
    parser.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="names or numbers; default: all, of many the first 10"
    )
    parser.add_argument("--num", type=positive, default=8, help="images of each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cfg", type=float, help="guidance scale")
    parser.add_argument("--cfg_schedule", choices=SCHEDULES)
    parser.add_argument("--temperature", type=float)
    parser.add_argument(
        "--num_iter_list", type=numbers, help="steps of each level above the pixel, such as 64,16"
    )
    parser.add_argument(
        "--batch", type=positive, default=64, help="images drawn together; the growth is that of the first"
    )
    parser.add_argument(
        "--chunk", type=positive, help="at most so many patches of a deeper level together, for less memory"
    )
    parser.add_argument("--device", help="default: the accelerator that torch finds, else cpu")
    parser.add_argument(
        "--sheet", type=Path, default=ROOT / "output" / "samples.png", help="a row for each class"
    )
    parser.add_argument(
        "--growth", type=Path, nargs="+", default=[], metavar="FILE", help=".gif, .mp4, or both"
    )
    parser.add_argument(
        "--levels", type=positive, default=1, help="so many levels' steps are seen in the growth"
    )
    parser.add_argument("--fps", type=positive, default=12, help="of the growth")
    parser.add_argument("--folders", type=Path, metavar="FOLDER", help="gets FOLDER/<class>/0000.png, …")
    parser.add_argument(
        "--zoom", type=positive, help="of sheet and growth; default: to 96 pixels an image or more"
    )
    return parser


def check_settings(model, args: argparse.Namespace) -> dict:
    """The settings for `generate`. UserError for one that is out of range, before anything is drawn."""
    defaults = model.sampling_defaults
    settings = dict(
        guidance_scale=defaults.guidance_scale if args.cfg is None else args.cfg,
        guidance_schedule=args.cfg_schedule or defaults.guidance_schedule,
        temperature=defaults.temperature if args.temperature is None else args.temperature,
    )
    try:
        Guidance.create(*settings.values(), defaults.filter_threshold, num_levels=len(model.generators))
        validate_num_iters(args.num_iter_list or defaults.num_inference_steps, len(model.generators))
        if not 0 <= args.seed < 2**63:
            raise ValueError(f"seed {args.seed} is out of range; it must be from 0 to 2**63 - 1")
    except ValueError as error:
        raise UserError(str(error)) from error
    if not model.class_num:
        settings["guidance_scale"] = None
    return dict(
        **settings,
        num_inference_steps=args.num_iter_list,
        seed=args.seed,
        chunk=args.chunk,
        watch_levels=args.levels,
    )


def draw(
    model, labels: list[int | None], settings: dict, batch: int, growth: Growth | None
) -> list[Image.Image]:
    """An image for each label, `batch` at a time; None is a model's only class, if it has none."""
    images = []
    for begin in range(0, len(labels), batch):
        some = labels[begin : begin + batch]
        images += model.generate(
            None if some[0] is None else some,
            num_images=len(some),
            indices=range(begin, begin + len(some)),
            callback_on_step_end=growth if begin == 0 else None,
            **settings,
        )
    return images


def write_folders(folder: Path, images: list[Image.Image], labels: list[int | None], names) -> None:
    """folder/<class>/<number>.png, written whole."""
    counts: dict[Path, int] = {}
    for image, label in zip(images, labels, strict=True):
        title = (
            "images"
            if label is None
            else f"{label:04d} {class_title(label, names)}"
            if names
            else f"{label:04d}"
        )
        where = folder / re.sub(r"[^\w ,.'-]", "_", title)
        save_image(where / f"{counts.setdefault(where, 0):04d}.png", image)
        counts[where] += 1


def save_image(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, durable=False) as temporary:
        image.save(temporary, "PNG")


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
    for path in args.growth:
        if path.suffix.lower() not in (".gif", ".mp4"):
            raise UserError(f"--growth {path}: its name must end in .gif or .mp4")
    if args.sheet.suffix.lower() != ".png":
        raise UserError(f"--sheet {args.sheet}: its name must end in .png")
    if args.folders and args.folders.is_dir() and any(args.folders.iterdir()):
        raise UserError(
            f"--folders {args.folders}: has something in it; give a new folder, so that no images mix"
        )
    model = zoo.load(args.model, args.device)
    settings = check_settings(model, args)
    if args.classes:
        classes = [find_class(said, model.class_names, model.class_num) for said in args.classes]
    else:
        classes = list(range(min(10, model.class_num))) or [None]
    labels = [label for label in classes for _ in range(args.num)]
    side = model.img_size_list[0]
    zoom = args.zoom or max(1, -(-96 // side))
    for path in (args.sheet, *args.growth):
        path.parent.mkdir(parents=True, exist_ok=True)  # before the work
    growth = Growth(args.num, zoom) if args.growth else None
    images = draw(model, labels, settings, args.batch, growth)
    rows = [] if classes == [None] else [class_title(label, model.class_names) for label in classes]
    save_image(args.sheet, make_sheet(images, args.num, zoom, rows))
    written = [args.sheet]
    if args.folders:
        write_folders(args.folders, images, labels, model.class_names)
        written.append(args.folders)
    for path in args.growth:
        save_animation(path, growth.frames, args.fps)
        written.append(path)
    print(f"{len(images)} images of {side} x {side} pixels, seed {args.seed}:", ", ".join(map(str, written)))


if __name__ == "__main__":
    main()
