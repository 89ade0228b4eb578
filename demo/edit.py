"""Repaint a part of an image; every other pixel stays as it is, to the bit.

    python demo/edit.py IMAGE --mask MASK         white is repainted (inpainting)
    python demo/edit.py IMAGE --box X Y W H       the box is repainted; with --label another class, it is a class edit
    python demo/edit.py IMAGE --outpaint X Y W H  all around the box is
    python demo/edit.py IMAGE --uncrop X Y SIZE   the image, made SIZE pixels wide and high, is placed at X Y of the model's
                                                  canvas, and all around it is painted

X Y W H and masks are in pixels of IMAGE, which may have any size: one that is not of the model's is first cropped and
scaled to it as for training (ADM's crop), and so is the mask; or with --tile repainted at its own size, in windows of the
model's. Writes OUT.png, several results as OUT-1.png, …, and OUT-sheet.png: before, mask, after.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.hub.classes import find_class  # noqa: E402
from models.hub.zoo import BUNDLED, load  # noqa: E402
from models.sampling.constraints import Grey, Palette, Within  # noqa: E402  need the path above when the package is not installed
from models.sampling.edit import box_mask, edit_tiled  # noqa: E402
from util.crop import center_crop_arr  # noqa: E402
from util.errors import UserError  # noqa: E402
from util.files import atomic_write  # noqa: E402
from util.flags import Parser  # noqa: E402
from util.inputs import open_exact, to_mask_batch  # noqa: E402
from util.pixels import make_sheet  # noqa: E402


def parse(arguments: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser("edit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--mask", type=Path, help="image of IMAGE's size, black and white: white is repainted")
    what.add_argument("--box", type=int, nargs=4, metavar=("X", "Y", "W", "H"))
    what.add_argument("--outpaint", type=int, nargs=4, metavar=("X", "Y", "W", "H"))
    what.add_argument("--uncrop", type=int, nargs=3, metavar=("X", "Y", "SIZE"))
    parser.add_argument(
        "--model",
        default=str(BUNDLED),
        help="folder of save_pretrained, id on the hub, or a published model's name",
    )
    parser.add_argument("--label", help="class, as a number or by its name; default: unconditional")
    parser.add_argument(
        "--tile", action="store_true", help="repaint at IMAGE's own size, in windows of the model's"
    )
    parser.add_argument("--results", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cfg", type=float, nargs="+", help="guidance scale, or one for each level above the pixel"
    )
    parser.add_argument(
        "--temperature", type=float, nargs="+", help="one, or one for each level; above 1 is sharper"
    )
    parser.add_argument("--num_iter", type=int, nargs="+", help="steps of each level, for a whole image")
    limits = parser.add_mutually_exclusive_group()
    limits.add_argument("--grey", action="store_true", help="repaint in grey")
    limits.add_argument("--palette", nargs="+", metavar="RRGGBB", help="repaint in these colours only")
    limits.add_argument(
        "--within", type=int, metavar="K", help="stay within K levels of IMAGE: restoration, de-quantisation"
    )
    parser.add_argument("--device", help="default: the accelerator that torch finds, else cpu")
    parser.add_argument("-o", "--output", type=Path, default=Path("edited.png"))
    return parser, parser.parse_args(arguments)


def constraint(args: argparse.Namespace):
    if args.palette:
        try:
            return Palette([list(bytes.fromhex(colour.removeprefix("#"))) for colour in args.palette])
        except ValueError as error:
            raise UserError(
                f"--palette {' '.join(args.palette)}: colours are RRGGBB, such as ff8800"
            ) from error
    return Grey() if args.grey else None if args.within is None else Within(args.within)


def prepare(args: argparse.Namespace, side: int) -> tuple[Image.Image, np.ndarray]:
    """The image to edit, and its mask (H, W) bool: of the model's size, or with --tile of IMAGE's."""
    image = open_exact(args.image)
    if args.uncrop:
        x, y, size = args.uncrop
        mask = ~box_mask(side, (x, y, size, size)).numpy()
        if not mask.any():
            raise UserError(
                f"nothing to repaint: an image of {size} x {size} pixels fills the model's canvas"
            )
        canvas = Image.new("RGB", (side, side), "grey")
        canvas.paste(center_crop_arr(image, size), (x, y))
        if image.size != (size, size):
            print(f"{args.image} ({image.width} x {image.height}) was cropped and scaled to {size} x {size}")
        return canvas, mask
    if args.mask:
        mask = to_mask_batch(open_exact(args.mask), (image.height, image.width))[0].numpy()
    else:
        mask = box_mask((image.height, image.width), args.box or args.outpaint).numpy()
        mask = mask if args.box else ~mask
    if not mask.any():
        raise UserError("nothing to repaint: the mask has no white pixel (white is repainted)")
    if args.tile or image.size == (side, side):
        return image, mask
    print(
        f"{args.image} ({image.width} x {image.height}) was cropped and scaled to the model's {side} x {side}; --tile does not"
    )
    touched = np.asarray(center_crop_arr(Image.fromarray(np.uint8(mask) * 255), side)) > 2
    if not touched.any():
        raise UserError("nothing to repaint: all that is white was cropped away; --tile crops nothing")
    return center_crop_arr(image, side), touched


def main(arguments: list[str] | None = None) -> None:
    parser, args = parse(arguments)
    with parser.one_line_errors(ValueError, OSError):
        run(args)


def run(args: argparse.Namespace) -> None:
    if args.output.suffix.lower() != ".png":
        raise UserError(f"-o {args.output}: must end in .png; other kinds would change known pixels")
    model = load(args.model, args.device)
    image, mask = prepare(args, model.img_size_list[0])
    given = {
        "guidance_scale": args.cfg,
        "temperature": args.temperature,
        "num_inference_steps": args.num_iter,
    }
    options = {
        name: values[0] if len(values) == 1 and "steps" not in name else values
        for name, values in given.items()
        if values
    }
    options.update(seed=args.seed, num_results=args.results, constraint=constraint(args))
    levels = np.asarray(image)
    label = None if args.label is None else find_class(args.label, model.class_names, model.class_num)
    if args.tile:
        results = edit_tiled(model, levels, mask, label, **options)
    else:
        results = model.edit(levels, mask, label, output_type="np", **options)
    assert (results == levels)[:, ~mask].all()
    results = [Image.fromarray(result) for result in results]
    stem = args.output.with_suffix("")
    names = [args.output] if len(results) == 1 else [Path(f"{stem}-{i + 1}.png") for i in range(len(results))]
    shown = Image.composite(Image.new("RGB", image.size, "magenta"), image, Image.fromarray(mask))
    sheet = make_sheet([image, shown, *results], columns=2 + len(results), zoom=max(1, 192 // image.width))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for path, result in zip([*names, Path(f"{stem}-sheet.png")], [*results, sheet], strict=True):
        with atomic_write(path) as temporary:
            result.save(temporary, "PNG")
    print(
        f"{mask.sum():,} of {mask.size:,} pixels repainted, the others the same to the bit: {', '.join(map(str, names))}"
    )


if __name__ == "__main__":
    main()
