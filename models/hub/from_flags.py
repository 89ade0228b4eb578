"""What the flags of main_fractalgen.py mean for a model: which one it is, its settings, its weights."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict

import torch

from models import fractalgen
from models.fractalgen import FractalGen
from models.generator import GENERATORS
from models.hub.classes import imagenet_names
from models.hub.presets import ADAPTED, CHOSEN, find_preset
from models.hub.source import Source, find
from models.layers import Block
from models.patches import as_shapes
from models.sampling.labels import find_class
from models.sampling.options import FLAGS, SamplingOptions
from util import checkpoint, download
from util.data.loader import ImageDataset, open_dataset
from util.dist import World
from util.errors import UserError, naming
from util.flags import from_flags
from util.pixels import RGB, Alphabet, shape_name
from util.precision import DTYPES
from util.run.folder import candidates
from util.run.settings import check_classes, check_ranges, fill_in


def origin(args: argparse.Namespace) -> Source | None:
    """What --resume holds, or if it holds nothing yet --finetune; None: neither is given."""
    if goes_on(args):
        return find(args.resume)
    return find(args.finetune) if args.finetune else None


def goes_on(args: argparse.Namespace) -> bool:
    """Whether --resume holds weights."""
    return bool(args.resume and candidates(checkpoint.locate(args.resume)))


def choose_preset(args: argparse.Namespace, source: Source | None) -> None:
    """Fills in the name of the model, which may be that of `source`, and what the name decides.

    The number of classes is that of the weights that --resume holds, where it is known. Sizes and what a cell
    holds are those of --resume, or of --finetune without --model, where no flags say them; but mean and std
    are not, where flags say that there are other channels or another kind of values.
    """
    if args.class_num is None and goes_on(args):
        args.class_num = source.class_num
    inherits = source is not None and (goes_on(args) or args.model is None)
    if args.model is None and source is not None and source.config is not None:
        if (name := source.preset) is None:
            raise UserError(f"{source.config_path}: its architecture is that of no --model NAME; see --help")
        args.model = name
    args.model = args.model or "fractalmar_in64"
    given = {name: x for name in CHOSEN if (x := getattr(args, name)) is not None}
    theirs = (source.config or {}) if inherits else {}
    cells = {name: theirs.get(name, getattr(RGB, name)) for name in ("channels", "value_kind")}
    if cells != {name: given.get(name, cells[name]) for name in cells}:
        theirs = {**theirs, "mean": None, "std": None}  # they are of other cells
    chosen = {name: given.get(name, theirs.get(name)) for name in CHOSEN}
    try:
        with naming({name: f"--{name}" for name in CHOSEN}):
            preset = find_preset(args.model, **chosen)
            alphabet = Alphabet(**preset.alphabet)
    except ValueError as error:
        raise UserError(str(error)) from error
    shape = as_shapes(preset.sizes)[0]
    size = shape[0] if len(shape) == 2 and len(set(shape)) == 1 else None
    if args.img_size not in (None, size):
        raise UserError(
            f"--img_size {args.img_size} contradicts --model {args.model}, which has {shape_name(shape)}"
        )
    vars(args).update(
        asdict(alphabet), img_size=size, img_size_list=preset.arguments["img_size_list"],
        num_conds=preset.num_conds, guiding_pixel=preset.guiding_pixel,
        num_iter_list=args.num_iter_list or preset.steps,
    )  # fmt: skip


def settle(args, source: Source | None, data: dict[str, ImageDataset], processes: int) -> None:
    """Fills in what depends on data or on the weights to begin with: classes, and training settings.

    Raises UserError for --class_labels that the model does not have.
    """
    known = source.config if source is not None and source.config is not None else {}
    classes = next((dataset.classes for dataset in data.values()), None)
    if args.class_num is None and classes is not None:
        args.class_num = len(classes)
    if args.class_num is None and source is not None:
        args.class_num = source.class_num
    args.class_names = (classes or None) if "train" in data else known.get("class_names")
    num_images = len(data["train"]) if "train" in data else None
    fill_in(args, fractalgen.PRESETS[args.model].lr, num_images, processes)
    if args.class_labels is not None:
        published = args.model in download.FILES and args.class_num == 1000
        names = args.class_names or (imagenet_names() if published else None)
        given = args.class_labels.split(",")
        args.class_labels = [find_class(one, names, args.class_num, "--class_labels") for one in given]


def sampling_options(args: argparse.Namespace) -> SamplingOptions:
    return from_flags(
        SamplingOptions, args, num_inference_steps=args.num_iter_list, guidance_scale=args.cfg,
        guidance_schedule=args.cfg_schedule, compiled=args.compile,
    )  # fmt: skip


def open_split(args: argparse.Namespace, split: str, world: World) -> ImageDataset:
    """The data of "train" or "val", in the shape and the alphabet of the model."""
    return open_dataset(
        args.data_path, split, as_shapes(args.img_size_list)[0], from_flags(Alphabet, args),
        class_num=args.class_num, seed=args.seed, flip=args.flip, shift=args.shift, strict=args.strict_data,
        world=world, num_workers=args.num_workers or 0,
    )  # fmt: skip


def build_model(args: argparse.Namespace) -> FractalGen:
    names = "guiding_pixel num_conds class_num label_drop_prob attn_dropout proj_dropout r_weight"
    try:
        flags = {name: getattr(args, name) for name in [*names.split(), "grad_checkpointing", *ADAPTED]}
        model = fractalgen.build(args.model, **flags)
    except ValueError as error:
        raise UserError(str(error)) from error
    for module in model.modules() if args.compile else ():
        if isinstance(module, Block):
            module.compile(dynamic=True)  # in training the number of masked patches differs from step to step
    return model


def divide(args: argparse.Namespace, model: FractalGen, device: torch.device):
    """With --shard, divides the weights of the model among the processes: a `Sharded`, otherwise None."""
    if args.shard:
        from util.run.sharding import Sharded  # whose imports take a second

        return Sharded(model, DTYPES.get(args.amp), device)


def check(args: argparse.Namespace, cells: Sequence[dict], processes: int) -> None:
    """Raises UserError for flags that cannot work, as far as they are known, with the changes of any cell."""
    check_ranges(args)
    if args.shard and args.optimizer == "muon":
        raise UserError("--shard needs --optimizer adamw: Muon's updates need whole matrices")
    if args.shard and (args.evaluate_nll or args.evaluate_gen or args.sweep):
        raise UserError(
            "--shard is for training: leave it out, an evaluation reads its checkpoints without it"
        )
    if args.shard and processes == 1 and not args.dry_run:
        raise UserError("--shard divides a model among processes: start several, with torchrun")
    if args.gpus and not args.dry_run:
        raise UserError(f"--gpus {args.gpus} only predicts: give --dry_run too")
    if args.gpu and not args.gpus:
        raise UserError(f"--gpu {args.gpu} says which GPUs to predict for: give --dry_run and --gpus too")
    if args.class_num is not None and not isinstance(args.class_labels, str):
        check_classes(args)
    preset = fractalgen.PRESETS[args.model]
    feature_cache = GENERATORS[preset.generators[0]].has_feature_cache
    try:
        for cell in cells:
            tried = argparse.Namespace(**{**vars(args), **cell})
            with naming(FLAGS):
                sampling_options(tried).guidance(len(preset.sizes) - 1, has_feature_cache=feature_cache)
            if args.class_num == 0 and tried.cfg != 1:
                raise UserError(f"--cfg {tried.cfg} needs classes; with --class_num 0 leave it out")
    except ValueError as error:
        raise UserError(str(error)) from error
