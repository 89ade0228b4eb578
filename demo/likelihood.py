"""Shows how many bits each pixel of an image costs under a model, and which classes explain the image best.

    python demo/likelihood.py IMAGE [--label CLASS] [--model MODEL] [-o OUT.png]

Writes a sheet of maps: the image, the bits of each pixel, and, with --label, how many bits it saves at each
pixel to know the class (green: the pixel speaks for the class; pink: against it). Prints bits by level and by
channel, and the most probable classes.
"""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from charts import enlarge, heat_map
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

from models.hub.zoo import load
from models.sampling.labels import find_class
from util.errors import naming
from util.flags import Parser
from util.pixels import make_sheet

FLAGS = {"num_inference_steps": "--num_iter", "num_orders": "--num_orders", "seed": "--seed"}


def get_parser() -> Parser:
    parser = make_parser("likelihood.py", __doc__)
    parser.add_argument("image", type=Path)
    parser.add_argument("--label", help="number or name of the class")
    add_model_flags(parser)
    parser.add_argument(
        "--num_orders", type=int, default=4, help="random orders to average over, if the model has MAR levels"
    )
    parser.add_argument(
        "--num_iter",
        type=int,
        nargs="+",
        help="steps: one number, or one for each level; default: the model's",
    )
    parser.add_argument(
        "--classes",
        type=whole_number(0),
        default=5,
        help="how many of the most probable classes to print; 0: none",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("likelihood.png"))
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(arguments)
    with parser.one_line_errors(ValueError, OSError), naming(FLAGS):
        run(args)


def run(args: argparse.Namespace) -> None:
    check_output("-o", args.output, ".png")
    model = load(args.model, args.device)
    side = image_size(model, square=True)[0]
    image = crop_and_scale(read_image(args.image), side, args.image)
    label = args.label
    if label is not None:
        label = find_class(label, model.class_names, model.class_num, "--label")
    settings = dict(
        num_orders=args.num_orders,
        num_inference_steps=one_or_list(args.num_iter),
        seed=args.seed,
        progress_bar=False,
    )

    def log_likelihood(reduce: str, label: int | None = None):
        return model.log_likelihood(image, label, reduce, **settings)

    def title(label: int) -> str:
        return f"{label} ({model.class_names[label]})" if model.class_names else str(label)

    print_table(log_likelihood, model)
    bits = -log_likelihood("pixel").bits[0].numpy()
    brightest = np.quantile(bits, 0.99)
    images, captions = [image, heat_map(bits, brightest)], ["image", f"bits of a pixel, 0 to {brightest:.1f}"]
    if label is not None:
        saved = bits + log_likelihood("pixel", label).bits[0].numpy()
        print(f"to know the class saves {saved.sum():.1f} bits: class {title(label)}")
        strongest = max(np.quantile(np.abs(saved), 0.99), 1e-9)
        images.append(heat_map(saved, strongest, -strongest, "PiYG"))
        captions.append(f"bits saved by the class, ±{strongest:.1f}")
    if args.classes and model.class_num > 1:
        posterior = model.classify(image, **settings)[0]
        print("most probable classes")
        for share, number in zip(*posterior.topk(min(args.classes, model.class_num)), strict=True):
            print(f"  {share:7.2%}  {title(int(number))}")
    shown = [enlarge(one.convert("RGB"), 256) for one in images]
    save_png(args.output, make_sheet(shown, columns=len(images), captions=captions))
    print(f"{', '.join(captions)}: {args.output}")


def print_table(log_likelihood: Callable, model) -> None:
    """Prints the bits of an image, in total, by the softmax below each level, and by channel.

    log_likelihood  "image", "level" or "channel" -> the image's log-likelihood, summed that way
    """
    total, levels, channels = (log_likelihood(reduce) for reduce in ("image", "level", "channel"))
    dims, channel_names = model.num_dims, map(str.upper, model.alphabet.channel_names)
    print(f"{-total.bits[0]:.1f} bits, {-total.bits[0] / dims:.3f} per dimension ", end="")
    print(f"(standard error over orders {total.standard_error[0] / dims:.3f})")
    names = [f"guiding pixels of level {level + 1}" for level in range(len(model.generators) - 1)] + [
        "pixels"
    ]
    rows = list(zip(names, levels.bits[0], strict=True))
    if model.alphabet.channels > 1:
        rows += zip(channel_names, channels.bits[0], strict=True)
    for name, bits in rows:
        if bits:
            print(f"  {name:<28}{-bits:10.1f} bits  {-bits / dims:7.3f} per dimension")


if __name__ == "__main__":
    main()
