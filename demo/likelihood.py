"""How surprising a model finds an image, pixel by pixel, and what class explains it best.

    python demo/likelihood.py IMAGE [--label CLASS] [--model MODEL] [-o OUT.png]

Writes a sheet: the image; its surprise, in bits a pixel; and, with a class, how many bits each pixel gains once the class
is known (green: speaks for the class, pink: against it). Prints bits by level and channel, and the likeliest classes.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from charts import heat_map  # noqa: E402

from models.fractalgen import FractalGen  # noqa: E402  need the path above when the package is not installed
from models.hub.classes import find_class  # noqa: E402
from models.hub.zoo import BUNDLED, load  # noqa: E402
from util.crop import center_crop_arr  # noqa: E402
from util.errors import UserError  # noqa: E402
from util.files import atomic_write  # noqa: E402
from util.flags import Parser  # noqa: E402
from util.inputs import open_exact  # noqa: E402
from util.pixels import make_sheet  # noqa: E402


def parse(arguments: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser(
        "likelihood.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", type=Path)
    parser.add_argument("--label", help="class, as a number or by its name")
    parser.add_argument(
        "--model",
        default=str(BUNDLED),
        help="folder of save_pretrained, id on the hub, or a published model's name",
    )
    parser.add_argument(
        "--num_orders", type=int, default=4, help="drawn orders to average, where the model has MAR levels"
    )
    parser.add_argument("--num_iter", type=int, nargs="+", help="steps of each level; default: the model's")
    parser.add_argument(
        "--classes", type=int, default=5, help="show so many of the likeliest classes; 0: do not classify"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: the accelerator that torch finds, else cpu")
    parser.add_argument("-o", "--output", type=Path, default=Path("likelihood.png"))
    return parser, parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    parser, args = parse(arguments)
    with parser.one_line_errors(ValueError, OSError):
        run(args)


def run(args: argparse.Namespace) -> None:
    if args.output.suffix.lower() != ".png":
        raise UserError(f"-o {args.output}: must end in .png")
    model = load(args.model, args.device)
    image, side = open_exact(args.image), model.img_size_list[0]
    if image.size != (side, side):
        print(
            f"{args.image} ({image.width} x {image.height}) was cropped and scaled to the model's {side} x {side}"
        )
        image = center_crop_arr(image, side)
    label = None if args.label is None else find_class(args.label, model.class_names, model.class_num)
    settings = dict(
        num_orders=args.num_orders, num_inference_steps=args.num_iter, seed=args.seed, progress_bar=False
    )
    read = lambda reduce, label=None: model.log_likelihood(image, label, reduce, **settings)  # noqa: E731
    table(read, side, len(model.generators))
    surprise = -read("pixel").bits[0].numpy()
    images = [image, heat_map(surprise, np.quantile(surprise, 0.99))]
    if label is not None:
        gain = read("pixel", label).bits[0].numpy() + surprise
        print(f"{gain.sum():+.1f} bits once the class is known: class {label}{name(model, label)}")
        most = max(np.quantile(np.abs(gain), 0.99), 1e-9)
        images.append(heat_map(gain, most, -most, "PiYG"))
    if args.classes and model.class_num > 1:
        posterior = model.classify(image, **settings)[0]
        print("likeliest classes")
        for share, number in zip(*posterior.topk(min(args.classes, model.class_num)), strict=True):
            print(f"  {share:7.2%}  {int(number)}{name(model, int(number))}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output) as temporary:
        make_sheet(images, columns=len(images), zoom=max(1, 256 // side)).save(temporary, "PNG")
    legend = f"image, surprise (0 to {np.quantile(surprise, 0.99):.1f} bits a pixel)" + ", gain by class" * (
        label is not None
    )
    print(f"{legend}: {args.output}")


def table(read, side: int, num_levels: int) -> None:
    """Bits of the image, without a class, by the softmax below each level and by channel."""
    whole_image, levels, channels = (read(reduce) for reduce in ("image", "level", "channel"))
    dims = 3 * side**2
    print(f"{-whole_image.bits[0]:.1f} bits, {-whole_image.bits[0] / dims:.3f} a dimension ", end="")
    print(f"(standard error over orders {whole_image.standard_error[0] / dims:.3f})")
    names = [f"guiding pixels of level {level + 1}" for level in range(num_levels - 1)] + ["pixels"]
    rows = [*zip(names, levels.bits[0], strict=True), *zip("RGB", channels.bits[0], strict=True)]
    for what, bits in rows:
        if bits:
            print(f"  {what:<28}{-bits:10.1f} bits  {-bits / dims:7.3f} a dimension")


def name(model: FractalGen, label: int) -> str:
    return f" ({model.class_names[label]})" if model.class_names else ""


if __name__ == "__main__":
    main()
