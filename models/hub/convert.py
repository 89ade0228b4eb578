"""Converts a checkpoint into a folder for FractalGen.from_pretrained, and compares the two.

python -m models.hub.convert pretrained_models/fractalmar_in64 OUT --model fractalmar_in64

Or writes a run's checkpoint, with its training state, as a single file or as a sharded run does:

python -m models.hub.convert RUN OUT --single
"""

import argparse
import shutil
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from models import fractalgen
from models.fractalgen import FractalGen
from models.likelihood.bits import evaluation_terms
from util import checkpoint
from util.errors import UserError, reading
from util.files import check_writable
from util.flags import Parser
from util.run.folder import SETTINGS


@torch.no_grad()
def fixed_outputs(model: FractalGen) -> Tensor:
    """Nats of every softmax for two fixed images, one with its class and one without."""
    alphabet, device = model.alphabet, model.fake_latent.device
    random = torch.Generator().manual_seed(0)
    shape = 2, alphabet.channels, *model.image_shape
    values = torch.randint(0, alphabet.num_values, shape, dtype=alphabet.dtype, generator=random)
    masks = model.draw_masks(model.noise(0, range(2)))
    labels, drop = torch.tensor([0, max(model.class_num - 1, 0)]), torch.tensor([False, True])
    terms = evaluation_terms(model, alphabet.normalize(values).to(device), labels, drop, masks)
    return torch.cat([term.nll.flatten() for term in terms]).cpu()


def convert(
    source: Path, folder: Path, name: str, *, ema: bool = False, class_names: list[str] | None = None
) -> int:
    """Writes the weights of the checkpoint `source` of model `name` into `folder`, and returns their number.

    Of the checkpoint only the weights are used. They give the number of classes; training settings (dropouts,
    r_weight) in the config are the constructor's defaults. Raises UserError unless the written weights are
    read back with the same bits and give the same outputs.
    """
    check_writable(folder / checkpoint.SAFETENSORS_NAME if folder.is_dir() else folder, str(folder))
    key = "model_ema" if ema else "model"
    if not (tensors := checkpoint.load(source, optimizer=False).get(key)):
        raise UserError(f"{source}: holds no weights {key!r}")
    embedding = tensors.get("class_emb.weight", torch.empty(0))
    model = fractalgen.build(name, class_num=len(embedding) if embedding.dim() else 1).eval()
    checkpoint.load_weights(model, tensors, source)
    with reading(source, "does not fit"):
        model.class_names = class_names
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
            f"{folder}: differs from {source} ({len(differing)} weights differ, the outputs by up to "
            f"{(after - before).abs().max():.3g}); do not use it"
        )
    return sum(value.numel() for value in written.values())


def rewrite(source: Path, folder: Path, sharded: bool) -> Path:
    """Writes the checkpoint `source` of a run in parts, or as a single file. Returns its path."""
    check_writable(folder / checkpoint.NAME, str(folder))
    content = checkpoint.load(source)
    if "step" not in content or checkpoint.list_numbered(folder):
        raise UserError(f"{source} must be a run's checkpoint, and {folder} hold none yet")
    path = checkpoint.numbered(folder, content["step"])
    if sharded:
        from util.run.sharding import Saver  # whose imports take a second

        saver = Saver()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # this process writes by itself
            saver.start(content, checkpoint.shards_of(path), partial(checkpoint.save, folder))
            if error := saver.wait():
                raise error
    else:
        checkpoint.save(folder, content)
    if (settings := source.with_name(SETTINGS)).exists():
        shutil.copyfile(settings, folder / SETTINGS)
    return path


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        "models.hub.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="the file, or the folder with checkpoint-last.pth")
    parser.add_argument("folder", type=Path, help="where the files shall be written")
    names = ", ".join(fractalgen.PRESETS)
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--model", choices=fractalgen.PRESETS, metavar="NAME", help=names)
    kinds.add_argument("--single", action="store_true", help="write a checkpoint that is a single file")
    kinds.add_argument("--sharded", action="store_true", help="write one as a sharded run does")
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    parser.add_argument(
        "--class_names", type=Path, help="a text file, a line for each class in the order of the labels"
    )
    args = parser.parse_args(argv)
    with parser.one_line_errors(OSError):
        class_names = None
        if args.class_names is not None:
            with reading(args.class_names, "no text file in UTF-8"):
                class_names = args.class_names.read_text(encoding="utf-8").splitlines()
        source = checkpoint.locate(args.checkpoint)
        if args.model is None:
            if args.ema or args.class_names:
                raise UserError(
                    "--ema and --class_names need --model: --single and --sharded keep everything"
                )
            path = rewrite(source, args.folder, args.sharded)
            return print(path)
        number = convert(source, args.folder, args.model, ema=args.ema, class_names=class_names)
    print(
        f"{args.folder}: {number:,} weights of {args.model}, the same bits as in {source}, and so are the "
        "outputs for two images"
    )


if __name__ == "__main__":
    main()
