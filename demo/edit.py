"""Repaints a part of an image. Every other pixel keeps exactly its value.

    python demo/edit.py IMAGE --mask MASK         repaints what is white in the mask (inpainting)
    python demo/edit.py IMAGE --box X Y W H       repaints the box; with --label, as that class (class edit)
    python demo/edit.py IMAGE --outpaint X Y W H  repaints everything outside the box
    python demo/edit.py IMAGE --uncrop X Y SIZE   scales the image to SIZE x SIZE pixels, places it at X Y of
                                                  the model's canvas, and paints everything around it

X Y W H are in pixels of IMAGE, and MASK has IMAGE's size. An image of another size than the model's is first
cropped and scaled as for training (ADM's crop), and so are mask and box; a line says where the box is then,
and another one if IMAGE is plainly unlike the images that the model was trained on. Writes OUT.png, or for
several results OUT-1.png, OUT-2.png, and so on; and OUT-sheet.png, which shows the image, in which a line
surrounds what is repainted, the mask and the results.
"""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import (
    add_model_flags,
    check_output,
    crop_and_scale,
    image_size,
    make_parser,
    one_or_list,
    read_image,
    save_png,
    whole_number,
)
from PIL import Image

from models.hub.about import unlike_training
from models.hub.zoo import load
from models.sampling.constraints import Constraint, Grey, Palette, Within
from models.sampling.edit import box_mask
from models.sampling.generate import is_out_of_memory
from util.crop import center_crop_arr, crop_map
from util.errors import UserError, naming
from util.flags import TEMPERATURE, Parser
from util.inputs import open_mask, to_mask_batch, to_value_batch
from util.pixels import make_sheet

MAX_RESULTS = 1000
COLUMNS, SIDE = 8, 160  # of the sheet: images in a row, and the least pixels of an image's side
FLAGS = {  # of the arguments that `model.edit` and others are called with
    "class_labels": "--label", "guidance_scale": "--cfg", "num_inference_steps": "--num_iter",
    "distance": "--within", "colours": "--palette", "temperature": "--temperature", "seed": "--seed",
}  # fmt: skip


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
        "--temperature", type=float, nargs="+", help=f"{TEMPERATURE}; one number, or one for each level"
    )
    parser.add_argument(
        "--num_iter",
        type=int,
        nargs="+",
        help="steps for a whole image: one number, or one for each level",
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
    image = read_image(args.image)
    if args.uncrop:
        return prepare_uncrop(image, args, side)
    cropped = crop_and_scale(image, side, args.image)
    if args.mask:
        return cropped, read_mask(args.mask, image.size, side)
    flag, box = ("--box", args.box) if args.box else ("--outpaint", args.outpaint)
    with naming({"box": flag}):
        box_mask((image.height, image.width), box)  # checks it
    inside = box_mask(side, box_in_crop(flag, box, image.size, side)).numpy()
    if inside.all() and args.outpaint:
        raise UserError("nothing to repaint: --outpaint keeps the whole image")
    return cropped, inside if args.box else ~inside


def read_mask(path: Path, size: tuple[int, int], side: int) -> np.ndarray:
    """Reads the mask of an image of `size` (width, height), crops it as the image; says if all is white."""
    mask = to_mask_batch(read_image(path, open_mask), size[::-1])[0].numpy()
    if not mask.any():
        raise UserError(f"--mask {path} is black everywhere: nothing to repaint, no pixel is white")
    if size != (side, side):
        mask = np.asarray(center_crop_arr(Image.fromarray(np.uint8(mask) * 255), side)) > 2
        if not mask.any():
            raise UserError(f"--mask {path}: nothing to repaint, all that is white was cropped away")
    if mask.all():
        print(f"--mask {path} is white everywhere: all is repainted, nothing of the image is kept")
    return mask


def box_in_crop(flag: str, box: Sequence[int], size: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """Returns a box (x, y, width, height) of an image of `size` (width, height) in pixels of its crop.

    --box repaints each pixel that the box touches, --outpaint keeps those that it covers. Prints a line where
    that differs from `box`; raises UserError where nothing of it is left.
    """
    if size == (side, side):
        return tuple(box)
    low, high = (math.floor, math.ceil) if flag == "--box" else (math.ceil, math.floor)
    edges, kept = [], []
    for (scale, offset), begin, length in zip(crop_map(size, side), box[:2], box[2:], strict=True):
        # rounding errors shall not take another pixel
        edges.append([round(place * scale - offset, 6) for place in (begin, begin + length)])
        kept.append((round(offset / scale), round(side / scale)))
    cut = "; the rest was cropped away" if any(begin < 0 or end > side for begin, end in edges) else ""
    (left, right), (top, bottom) = ((max(0, low(begin)), min(side, high(end))) for begin, end in edges)
    given = f"{flag} {' '.join(map(str, box))}"
    if left >= right or top >= bottom:
        (x, width), (y, height) = kept
        raise UserError(
            f"{given} leaves no pixel of the model's {side} x {side}; "
            f"the crop keeps {x} {y} {width} {height} of the image"
        )
    found = left, top, right - left, bottom - top
    print(f"{given} is {' '.join(map(str, found))} of these {side} x {side} pixels{cut}")
    return found


def prepare_uncrop(image: Image.Image, args: argparse.Namespace, side: int) -> tuple[Image.Image, np.ndarray]:
    """Does the work of `prepare` for --uncrop."""
    x, y, size = args.uncrop
    with naming({"box": "--uncrop"}):
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
    given, mask = prepare(args, image_size(model, square=True)[0])
    values = to_value_batch(given, model.image_shape, model.alphabet)
    (image,) = model.alphabet.to_pil(model.alphabet.normalize(values))  # as the model sees it
    if not args.uncrop and (warning := unlike_training(model, values)):
        print(f"{args.image}: {warning}")
    with naming(FLAGS):
        results = model.edit(
            values,
            mask,
            args.label,
            num_results=args.results,
            constraint=get_constraint(args),
            guidance_scale=one_or_list(args.cfg),
            temperature=one_or_list(args.temperature),
            num_inference_steps=one_or_list(args.num_iter),
            seed=args.seed,
        )
    assert all((np.asarray(result) == np.asarray(image))[~mask].all() for result in results)
    write(args.output, image, mask, results)


def sheet(image: Image.Image, mask: np.ndarray, results: Sequence[Image.Image]) -> Image.Image:
    """Lays out the image with the edge of the mask, the mask in magenta, and the results, with captions."""
    zoom = max(1, -(-SIDE // image.width))
    size = image.width * zoom, image.height * zoom
    enlarged = [one.convert("RGB").resize(size, Image.Resampling.NEAREST) for one in (image, *results)]
    white = np.kron(mask, np.ones((zoom, zoom), bool))
    width = 2  # of the line, which lies inside of the mask
    padded = np.pad(white, width, constant_values=False)
    shifted = [np.roll(padded, (y, x), (0, 1)) for y in (-width, 0, width) for x in (-width, 0, width)]
    edge = white & ~np.logical_and.reduce(shifted)[width:-width, width:-width]
    magenta = Image.new("RGB", enlarged[0].size, "magenta")
    given, drawn = enlarged[0], enlarged[1:]
    shown = [Image.composite(magenta, given, Image.fromarray(part)) for part in (edge, white)]
    names = [f"result {i + 1}" for i in range(len(drawn))] if len(drawn) > 1 else ["result"]
    captions = ["image", "repainted: magenta", *names]
    return make_sheet([*shown, *drawn], min(COLUMNS, len(captions)), captions=captions)


def write(output: Path, image: Image.Image, mask: np.ndarray, results: list[Image.Image]) -> None:
    """Writes the results and the sheet that shows them, and prints their names."""
    paths = [output]
    if len(results) > 1:
        paths = [output.with_name(f"{output.stem}-{i + 1}.png") for i in range(len(results))]
    for path, result in zip(paths, results, strict=True):
        save_png(path, result)
    save_png(output.with_name(f"{output.stem}-sheet.png"), sheet(image, mask, results))
    print(f"{mask.sum():,} of {mask.size:,} pixels repainted, the others are exactly the same:", end=" ")
    print(", ".join(map(str, paths)))


if __name__ == "__main__":
    main()
