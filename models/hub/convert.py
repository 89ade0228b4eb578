"""A checkpoint becomes a folder for FractalGen.from_pretrained, and is held against it.

python -m models.hub.convert pretrained_models/fractalmar_in64 OUT --model fractalmar_in64
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from models import fractalgen
from models.fractalgen import FractalGen
from models.noise import Noise
from util import checkpoint
from util.errors import UserError, one_line
from util.flags import Parser
from util.pixels import normalize


@torch.no_grad()
def fixed_outputs(model: FractalGen) -> Tensor:
    """Nats of every softmax for two fixed images, one with its class and one without: a function of the weights alone."""
    side, device = model.img_size_list[0], model.fake_latent.device
    levels = torch.randint(
        0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    masks = model.draw_masks(Noise.of_images(0, range(2), model.noise_sizes))
    _, terms = model(
        normalize(levels).to(device),
        torch.tensor([0, max(model.class_num - 1, 0)], device=device),
        masks=[mask and mask.to(device) for mask in masks],
        label_drop=torch.tensor([False, True], device=device),
        train=False,
        dither=0.0,
        return_terms=True,
    )
    return torch.cat([term.nll.flatten() for term in terms]).cpu()


def convert(
    source: Path, folder: Path, name: str, *, ema: bool = False, class_names: list[str] | None = None
) -> int:
    """Writes the weights of the checkpoint `source` of model `name` into `folder`, and returns their number.

    Nothing in the checkpoint is believed but its weights: the number of classes is their own, and the config says of the
    training settings (dropouts, r_weight) what the constructor does. Raises UserError unless what was written is read back
    with the same bits, and gives the same outputs.
    """
    key = "model_ema" if ema else "model"
    if not (tensors := checkpoint.load(source).get(key)):
        raise UserError(f"{source}: holds no weights {key!r}")
    embedding = tensors.get("class_emb.weight", torch.empty(0))
    model = fractalgen.build(name, class_num=len(embedding) if embedding.dim() else 1).eval()
    checkpoint.load_weights(model, tensors, source)
    try:
        model.class_names = class_names
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    before = fixed_outputs(model)
    if not before.isfinite().all():
        raise UserError(f"{source}: its outputs are not finite, so they cannot be compared")
    model.save_pretrained(folder)
    written = checkpoint.load_safetensors(folder / checkpoint.SAFETENSORS_NAME)
    differing = [name for name, value in model.state_dict().items() if not torch.equal(value, written[name])]
    del model  # two of the largest need 7 GB
    after = fixed_outputs(FractalGen.from_pretrained(folder))
    if differing or not torch.equal(before, after):
        raise UserError(
            f"{folder}: is not what {source} is ({len(differing)} weights differ, the outputs by up to "
            f"{(after - before).abs().max():.3g}); do not use it"
        )
    return sum(value.numel() for value in written.values())


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no text file in UTF-8 ({one_line(error)})") from error


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        "models.hub.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="the file, or the folder with checkpoint-last.pth")
    parser.add_argument("folder", type=Path, help="where model.safetensors and config.json shall be written")
    parser.add_argument(
        "--model",
        required=True,
        choices=fractalgen.PRESETS,
        metavar="NAME",
        help=", ".join(fractalgen.PRESETS),
    )
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    parser.add_argument(
        "--class_names", type=Path, help="a text file, a line for each class in the order of the labels"
    )
    args = parser.parse_args(argv)
    try:
        names = read_lines(args.class_names) if args.class_names else None
        source = checkpoint.locate(args.checkpoint)
        number = convert(source, args.folder, args.model, ema=args.ema, class_names=names)
    except (OSError, UserError) as error:
        parser.error(str(error))
    print(
        f"{args.folder}: {number:,} weights of {args.model}, the same bits as in {source}, and so are the "
        "outputs for two images"
    )


if __name__ == "__main__":
    main()
