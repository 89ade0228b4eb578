"""Repaints a part of an image. Every other pixel keeps exactly its value.

    python demo/edit.py IMAGE --mask MASK         repaints what is white in the mask (inpainting)
    python demo/edit.py IMAGE --box X Y W H       repaints the box; with --label, as that class (class edit)
    python demo/edit.py IMAGE --outpaint X Y W H  repaints everything outside the box
    python demo/edit.py IMAGE --uncrop X Y SIZE   scales the image to SIZE x SIZE pixels, places it at X Y of
                                                  the model's canvas, and paints everything around it

X Y W H are in pixels of IMAGE, and MASK has IMAGE's size. An image of another size than the model's is first
cropped and scaled as for training (ADM's crop), and so is the mask. Writes OUT.png, or for several results
OUT-1.png, OUT-2.png, and so on; and OUT-sheet.png, which shows the image, the mask and the results.
"""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
import argparse
from pathlib import Path

import numpy as np
from common import add_model_flags, check_output, crop_and_scale, make_parser, save_png, whole_number
from PIL import Image

from models.hub.classes import find_class
from models.hub.zoo import load
from models.sampling.constraints import Constraint, Grey, Palette, Within
from models.sampling.edit import box_mask
from models.sampling.generate import is_out_of_memory
from util.crop import center_crop_arr
from util.errors import UserError
from util.flags import Parser
from util.inputs import open_exact, to_mask_batch
from util.pixels import make_sheet

MAX_RESULTS = 1000  # the sheet shows them in one row


def get_parser() -> Parser:
    parser = make_parser("edit.py", __doc__)
    parser.add_argument("image", type=Path)
    area = parser.add_mutually_exclusive_group(required=True)
    area.add_argument(
        "--mask", type=Path, help="black and white image of IMAGE's size; what is white is repainted"
    )
    area.add_argument("--box", type=int, nargs=4, metavar=("X", "Y", "W", "H"))
    area.add_argument("--outpaint", type=int, nargs=4, metavar=("X", "Y", "W", "H"))
    area.add_argument("--uncrop", type=int, nargs=3, metavar=("X", "Y", "SIZE"))
    add_model_flags(parser)
    parser.add_argument("--label", help="number or name of the class; default: unconditional")
    parser.add_argument(
        "--results", type=whole_number(1, MAX_RESULTS), default=1, help=f"at most {MAX_RESULTS}"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cfg", type=float, nargs="+", help="guidance scale: one, or one for each level above the pixel"
    )
    parser.add_argument(
        "--temperature", type=float, nargs="+", help="one, or one for each level; above 1 is sharper"
    )
    parser.add_argument(
        "--num_iter",
        type=int,
        nargs="+",
        help="steps of each level, counted for a whole image",
    )
    limits = parser.add_mutually_exclusive_group()
    limits.add_argument("--grey", action="store_true", help="repaint in grey")
    limits.add_argument("--palette", nargs="+", metavar="RRGGBB", help="repaint in these colours only")
    limits.add_argument(
        "--within", type=int, metavar="K", help="change values (0 to 255) by at most K, to restore an image"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("edited.png"), help="PNG, which keeps values exactly"
    )
    return parser


def get_constraint(args: argparse.Namespace) -> Constraint | None:
    if args.palette:
        try:
            return Palette([list(bytes.fromhex(colour.removeprefix("#"))) for colour in args.palette])
        except ValueError as error:
            raise UserError(
                f"--palette {' '.join(args.palette)}: colours are RRGGBB, such as ff8800"
            ) from error
    if args.within is not None:
        return Within(args.within)
    return Grey() if args.grey else None


def prepare(args: argparse.Namespace, side: int) -> tuple[Image.Image, np.ndarray]:
    """Returns the image, of the model's size, and its mask, bool (side, side), which is True to repaint."""
    image = open_exact(args.image)
    if args.uncrop:
        return prepare_uncrop(image, args, side)
    if args.mask:
        mask = to_mask_batch(open_exact(args.mask), (image.height, image.width))[0].numpy()
    else:
        mask = box_mask((image.height, image.width), args.box or args.outpaint).numpy()
        mask = mask if args.box else ~mask
    if not mask.any():
        raise UserError("nothing to repaint: the mask has no white pixel (white is repainted)")
    if image.size != (side, side):
        image = crop_and_scale(image, side, args.image)
        mask = np.asarray(center_crop_arr(Image.fromarray(np.uint8(mask) * 255), side)) > 2
        if not mask.any():
            raise UserError("nothing to repaint: all that is white in the mask was cropped away")
    return image, mask


def prepare_uncrop(image: Image.Image, args: argparse.Namespace, side: int) -> tuple[Image.Image, np.ndarray]:
    """Does the work of `prepare` for --uncrop."""
    x, y, size = args.uncrop
    mask = ~box_mask(side, (x, y, size, size)).numpy()
    if not mask.any():
        raise UserError(f"nothing to repaint: an image of {size} x {size} pixels is as large as the model's")
    canvas = Image.new("RGB", (side, side), "grey")
    canvas.paste(crop_and_scale(image, size, args.image), (x, y))
    return canvas, mask


def main(arguments: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(arguments)
    with parser.one_line_errors(ValueError, OSError):
        try:
            run(args)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError("out of memory; give fewer --results") from error


def run(args: argparse.Namespace) -> None:
    check_output("-o", args.output, ".png")
    model = load(args.model, args.device)
    image, mask = prepare(args, model.img_size_list[0])
    values = np.asarray(image)
    results = model.edit(
        values,
        mask,
        None if args.label is None else find_class(args.label, model.class_names, model.class_num),
        num_results=args.results,
        constraint=get_constraint(args),
        guidance_scale=one_or_list(args.cfg),
        temperature=one_or_list(args.temperature),
        num_inference_steps=args.num_iter,
        seed=args.seed,
        output_type="np",
    )
    assert (results == values)[:, ~mask].all()
    write(args.output, image, mask, [Image.fromarray(result) for result in results])


def one_or_list(numbers: list[float] | None) -> float | list[float] | None:
    """Returns the only number of a list, or the list if there are several."""
    return numbers[0] if numbers is not None and len(numbers) == 1 else numbers


def write(output: Path, image: Image.Image, mask: np.ndarray, results: list[Image.Image]) -> None:
    """Writes the results and the sheet that shows them, and prints their names."""
    paths = [output]
    if len(results) > 1:
        paths = [output.with_name(f"{output.stem}-{i + 1}.png") for i in range(len(results))]
    for path, result in zip(paths, results, strict=True):
        save_png(path, result)
    masked = Image.composite(Image.new("RGB", image.size, "magenta"), image, Image.fromarray(mask))
    sheet = make_sheet([image, masked, *results], columns=2 + len(results), zoom=max(1, 192 // image.width))
    save_png(output.with_name(f"{output.stem}-sheet.png"), sheet)
    print(f"{mask.sum():,} of {mask.size:,} pixels repainted, the others are exactly the same:", end=" ")
    print(", ".join(map(str, paths)))


if __name__ == "__main__":
    main()
