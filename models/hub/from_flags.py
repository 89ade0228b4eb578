"""What the flags of main_fractalgen.py mean for a model: which one it is, its settings, its weights."""

import argparse
from collections.abc import Sequence

from models import fractalgen
from models.fractalgen import FractalGen
from models.generator import GENERATORS
from models.hub.classes import imagenet_names
from models.hub.presets import find_preset
from models.hub.source import Source, find
from models.layers import Block
from models.sampling.labels import find_class
from models.sampling.options import FLAGS, SamplingOptions
from util import checkpoint, download
from util.data.loader import ImageDataset
from util.errors import UserError, naming
from util.flags import from_flags
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

    The number of classes is that of the weights that --resume holds, where it is known.
    """
    if args.class_num is None and goes_on(args):
        args.class_num = source.class_num
    if args.model is None and source is not None and source.config is not None:
        if (name := source.preset) is None:
            raise UserError(f"{source.config_path}: its architecture is that of no --model NAME; see --help")
        args.model = name
    args.model = args.model or "fractalmar_in64"
    try:
        preset = find_preset(args.model, guiding_pixel=args.guiding_pixel, num_conds=args.num_conds)
    except ValueError as error:
        raise UserError(str(error)) from error
    size = preset.sizes[0]
    if args.img_size not in (None, size):
        raise UserError(f"--img_size {args.img_size} contradicts --model {args.model}, which has {size}")
    args.img_size, args.num_iter_list = size, args.num_iter_list or preset.steps


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


def build_model(args: argparse.Namespace) -> FractalGen:
    names = "guiding_pixel num_conds class_num label_drop_prob attn_dropout proj_dropout r_weight"
    try:
        flags = {name: getattr(args, name) for name in [*names.split(), "grad_checkpointing"]}
        model = fractalgen.build(args.model, **flags)
    except ValueError as error:
        raise UserError(str(error)) from error
    for module in model.modules() if args.compile else ():
        if isinstance(module, Block):
            module.compile(dynamic=True)  # in training the number of masked patches differs from step to step
    return model


def check(args: argparse.Namespace, cells: Sequence[dict]) -> None:
    """Raises UserError for flags that cannot work, as far as they are known, with the changes of any cell."""
    check_ranges(args)
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
