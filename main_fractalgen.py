"""Train, measure and sample fractal generative models: flags become objects, and one call does the work.

python main_fractalgen.py --model fractalmar_in64 --data_path IMAGENET ...          one process
torchrun --nproc_per_node=8 main_fractalgen.py --model fractalmar_in64 ...          many
"""

import util  # noqa: F401  before torch, see util/threads.py

# isort: split
import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch

import engine_fractalgen as engine
from evaluation import sweep
from evaluation.images import draw
from evaluation.reference import where_from
from evaluation.report import cost_report
from evaluation.score import scorer_of_flags
from models import fractalgen
from models.fractalgen import FractalGen
from models.generator import GENERATORS
from models.layers import Block
from models.sampling.guidance import SCHEDULES
from models.sampling.options import SamplingOptions
from models.sampling.precision import choose_model_amp
from util import checkpoint, dist, precision
from util.data.loader import ImageLoader, make_loader, open_dataset
from util.errors import UserError
from util.files import sha256, write_json
from util.flags import check_classes, check_ranges, from_flags, get_args_parser, make_writable, provenance
from util.pixels import make_sheet
from util.threads import limit_threads


def main(argv: list[str] | None = None) -> None:
    """The command line. Bad input ends it with one line and exit status 2."""
    parser = get_args_parser(__doc__, tuple(fractalgen.PRESETS), tuple(SCHEDULES), tuple(engine.LR_SCHEDULES))
    args = parser.parse_args(argv)
    with parser.one_line_errors():
        run(args)
    # not after an error: other processes may be waiting for this one, and leaving frees them
    dist.disconnect()


def run(args: argparse.Namespace) -> None:
    world = dist.from_environment(args.dist_on_itp, args.world_size, args.local_rank)
    device = resolve(args, world)
    computing = [limit_threads()] if device.type == "cpu" else []
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in what autocast leaves in float32
    torch.manual_seed(args.seed)
    with torch.device("meta" if args.dry_run else device):
        model = build_model(args)
    if args.dry_run:
        if world.is_main:
            computing += set_amp(args, model, device, dist.World())
            for line in computing:
                print(line, file=sys.stderr)
            cost = cost_report(model, args.batch_size, sampling_options(args))
            print(json.dumps({**provenance(args), **cost}, indent=2))
        return
    output_dir = make_writable(args.output_dir) if args.output_dir else None
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(args.seed + world.rank)
    dist.connect(world, device, args.dist_url)
    computing += set_amp(args, model, device, world)
    autocast = precision.autocast(args.amp, device)
    scorer = None
    if args.evaluate_gen or args.online_eval or args.sweep:  # what is missing is said now, not after hours
        scorer = scorer_of_flags(args, device, world)

    def measure(model: FractalGen, loader: ImageLoader, say) -> dict:
        """compute_nll of the images that can be read, and how many cannot."""
        scores = engine.compute_nll(
            model, loader, passes=args.nll_forward_number, seed=args.seed, conditional=args.nll_labels,
            num_iter_list=args.num_iter_list if args.nll_schedule else None, device=device,
            autocast=autocast, world=world,
        )  # fmt: skip
        return {**scores, "num_bad_images": loader.report_bad(say)}

    def generate(model: FractalGen, folder: Path, cell: dict | None = None, step: int = 0) -> dict:
        """Numbered PNGs in `folder`, of a `step` of training, and their scores if there is a reference."""
        own = argparse.Namespace(**{**vars(args), **(cell or {})})
        return engine.evaluate(
            model, folder, sampling_options(own), scorer=scorer, run=provenance(own), step=step,
            num_images=args.num_images, batch_size=args.gen_bsz, seed=args.seed, world=world,
            classes=args.class_labels,
            say=lambda line: print(line, file=sys.stderr),
        )  # fmt: skip

    if args.evaluate_nll or args.evaluate_gen or args.sweep:
        evaluate(args, model, output_dir, device, world, measure, generate, computing)
        if args.evaluate_gen and scorer is None and world.is_main:
            print(f"no --fid_stats: the images are not scored; {where_from(args.img_size)}", file=sys.stderr)
    else:
        train(args, model, output_dir, device, autocast, world, measure, generate, computing)


def resolve(args: argparse.Namespace, world: dist.World) -> torch.device:
    """Fills in what the flags leave open, checks what can be checked without data, and returns the device."""
    device, preset = dist.pick_device(args.device, world), fractalgen.PRESETS[args.model]
    args.device = args.device or device.type
    size = preset.sizes[0]
    if args.img_size not in (None, size):
        raise UserError(f"--img_size {args.img_size} contradicts --model {args.model}, which has {size}")
    args.img_size, args.num_iter_list = size, args.num_iter_list or preset.steps
    if args.lr is None:
        args.lr = args.blr * args.batch_size * args.accum_iter * world.size / 256
    check_ranges(args)
    check_classes(args)
    feature_cache = GENERATORS[preset.generators[0]].has_feature_cache
    try:
        for cell in sweep.cells(args.sweep or []) or [{}]:
            tried = argparse.Namespace(**{**vars(args), **cell})
            sampling_options(tried).guidance(len(preset.sizes) - 1, has_feature_cache=feature_cache)
            if args.class_num == 0 and tried.cfg != 1:
                raise UserError(f"--cfg {tried.cfg} needs classes; with --class_num 0 leave it out")
    except ValueError as error:
        raise UserError(str(error)) from error
    return device


def set_amp(args, model: FractalGen, device: torch.device, world: dist.World) -> list[str]:
    """Chooses --amp, where it is not given, by a measurement on the first process. Says why."""
    if args.amp is not None:
        return []
    num_images = None if args.evaluate_gen or args.sweep else args.batch_size
    args.amp, reason = dist.on_main(world, lambda: choose_model_amp(model, device, num_images))
    return [f"--amp {args.amp}: {reason}"]


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


def open_loader(args, split: str, batch_size: int, device: torch.device, world: dist.World) -> ImageLoader:
    """The loader of the images of "train", shuffled, or of "val"."""
    dataset = open_dataset(
        Path(args.data_path), split, args.img_size, class_num=args.class_num, seed=args.seed, flip=args.flip,
        strict=args.strict_data, world=world, num_workers=args.num_workers,
    )  # fmt: skip
    return make_loader(
        dataset, batch_size, world, shuffled=split == "train", num_workers=args.num_workers,
        pin_memory=args.pin_mem and device.type != "cpu",
    )  # fmt: skip


def evaluate(
    args, model: FractalGen, output_dir: Path | None, device, world, measure, generate, computing: list[str]
) -> None:
    """--evaluate_nll and --evaluate_gen: prints a JSON line each. --sweep: see evaluation/sweep.py."""
    path = checkpoint.load_model(model, args.resume, args.ema) if args.resume else None
    say = lambda line: print(line, file=sys.stderr) if world.is_main else None  # noqa: E731
    loader = open_loader(args, "val", args.nll_bsz, device, world) if args.evaluate_nll else None
    for line in computing if path else [*computing, "no --resume: the weights are random"]:
        say(line)
    if loader is not None:
        kind, number = loader.dataset.source.kind, len(loader.dataset)
        say(f"{args.data_path}: {kind}, {number} images in val")
        scores = measure(model, loader, say)
        if world.is_main:
            scores = {name: None if x != x else x for name, x in scores.items()}  # JSON knows no nan
            print(json.dumps(scores), flush=True)
        if world.is_main and output_dir is not None:
            used = {"path": str(path), "sha256": sha256(path), "ema": args.ema} if path else None
            data = {"path": args.data_path, "kind": kind, "num_images": number}
            about = {"checkpoint": used, "data": data, **provenance(args), "processes": world.size}
            write_json(output_dir / "nll.json", {**scores, **about})
    if args.evaluate_gen:
        folder = output_dir / "generated"
        scores = generate(model, folder)
        if world.is_main:
            print(json.dumps({**scores, "folder": str(folder)}))
    if args.sweep:
        sweep.run(
            lambda cell, folder: generate(model, folder / "generated", cell), folder=output_dir / "sweep",
            cells=sweep.cells(args.sweep), num_images=args.num_images, seed=args.seed, is_main=world.is_main,
        )  # fmt: skip


def train(
    args, model: FractalGen, output_dir: Path | None, device, autocast, world, measure, generate,
    computing: list[str],
) -> None:  # fmt: skip
    loader = open_loader(args, "train", args.batch_size, device, world)
    val_loader = open_loader(args, "val", args.nll_bsz, device, world)
    data = train_set, val_set = loader.dataset, val_loader.dataset
    if train_set.classes != val_set.classes:
        raise UserError(f"{args.data_path}: train/ and val/ have different classes")

    def measure_all(model: FractalGen, step: int, log) -> dict[str, float]:
        """Bits/dim of the validation images and a grid of samples; with --online_eval also numbered PNGs."""
        scores = measure(model, val_loader, log.note)
        if world.is_main:
            classes = np.linspace(0, max(args.class_num - 1, 0), num=16).astype(int).tolist()
            images = draw(model, classes, range(16), sampling_options(args), args.seed)
            log.image(step, "samples", make_sheet(images, columns=8))
        dist.barrier()
        if args.online_eval:
            log.note(f"images: {generate(model, output_dir / f'generated-{step:07d}', step=step)}")
        return {name: x for name, x in scores.items() if isinstance(x, (int, float))}

    kinds = " and ".join(dict.fromkeys(part.source.kind for part in data))
    sizes = f"{len(train_set.classes)} classes, {len(train_set)} + {len(val_set)} images"
    engine.Training(
        model, loader, measure_all,
        from_flags(engine.Recipe, args, ema_decay=args.ema_decay if args.ema else None),
        from_flags(engine.SavePolicy, args),
        output_dir=output_dir, resume_from=args.resume, start_epoch=args.start_epoch, seed=args.seed,
        flags=args, about=[f"{args.data_path}: {kinds}, {sizes}", *computing], half=args.amp == "fp16",
        device=device, autocast=autocast, world=world,
    ).run()  # fmt: skip


if __name__ == "__main__":
    main()
