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
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

import engine_fractalgen as engine
from evaluation import sweep
from evaluation.images import draw_sheet
from evaluation.reference import where_from
from evaluation.report import cost_report
from evaluation.scaling import predict_step
from evaluation.score import scorer_of_flags
from models import fractalgen
from models.fractalgen import FractalGen
from models.hub import finetune
from models.hub.from_flags import (
    build_model,
    check,
    choose_preset,
    divide,
    goes_on,
    open_split,
    origin,
    sampling_options,
    settle,
)  # fmt: skip
from models.hub.source import Source
from models.sampling.guidance import SCHEDULES
from models.sampling.precision import choose_model_amp
from util import checkpoint, dist, precision
from util.data.loader import ImageDataset, ImageLoader, make_loader
from util.errors import UserError
from util.files import make_writable, sha256, write_json
from util.flags import from_flags, get_args_parser, provenance
from util.run.plan import free_gib, make_plan
from util.threads import limit_threads


def main(argv: list[str] | None = None) -> None:
    """The command line. Bad input ends it with one line and exit status 2."""
    parser = get_args_parser(__doc__, tuple(fractalgen.PRESETS), tuple(SCHEDULES), tuple(engine.LR_SCHEDULES))
    args = parser.parse_args(argv)
    with parser.one_line_errors(), dist.explaining_silence():
        run(args)
    # not after an error: other processes may be waiting for this one, and leaving frees them
    dist.disconnect()


def run(args: argparse.Namespace) -> None:
    world = dist.from_environment(args.dist_on_itp, args.world_size, args.local_rank)
    device = dist.pick_device(args.device, world)
    args.device = args.device or device.type
    source = origin(args)
    choose_preset(args, source)
    cells = sweep.cells(args.sweep or []) or [{}]
    check(args, cells, world.size)
    computing = [limit_threads()] if device.type == "cpu" else []
    if args.dry_run:
        if world.is_main:
            dry_run(args, source, device, world, computing)
        return
    output_dir = make_writable(args.output_dir) if args.output_dir else None
    dist.connect(world, device, args.dist_url, args.dist_timeout)
    evaluates = args.evaluate_gen or args.sweep
    splits = ["val"] if args.evaluate_nll else [] if evaluates else ["train", "val"]
    data = {split: open_split(args, split, world) for split in splits}
    settle(args, source, data, world.size)
    check(args, cells, world.size)
    torch.manual_seed(args.seed)
    with torch.device("cpu") if args.shard else device:  # which may hold only a part
        model = build_model(args)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(args.seed + world.rank)
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
        """Numbered images in `folder`, of a `step` of training, and their scores if there is a reference."""
        own = argparse.Namespace(**{**vars(args), **(cell or {})})
        return engine.evaluate(
            model, folder, sampling_options(own), scorer=scorer, run=provenance(own), step=step,
            num_images=args.num_images, batch_size=args.gen_bsz, seed=args.seed, world=world,
            classes=args.class_labels, say=lambda line: print(line, file=sys.stderr),
        )  # fmt: skip

    if args.evaluate_nll or args.evaluate_gen or args.sweep:
        evaluate(args, model, data, output_dir, device, world, measure, generate, computing)
        unscored = scorer is None and model.alphabet.is_image(model.image_shape)
        if args.evaluate_gen and unscored and world.is_main:
            print(f"no --fid_stats: the images are not scored; {where_from(args.img_size)}", file=sys.stderr)
    else:
        train(args, model, source, data, output_dir, device, autocast, world, measure, generate, computing)


def dry_run(
    args, source: Source | None, device: torch.device, world: dist.World, computing: list[str]
) -> None:
    """--dry_run: prints what a run would be, in lines and as JSON, and measures a training step."""
    try:
        data = {split: open_split(args, split, dist.World()) for split in ("train", "val")}
    except UserError as error:
        computing.append(f"no images to train on: {error}")
        data = {}
    settle(args, source, data, world.size)
    check(args, [{}], world.size)
    with torch.device("meta"):
        model = build_model(args)
    predicted = predict_step(args, model.arguments, computing)
    computing += set_amp(args, model, device, dist.World())
    report = {**provenance(args), **cost_report(model, args.batch_size, sampling_options(args)), **predicted}
    if data:
        gib = report["training_gib_in_float32"]["largest peak"]
        plan = replace(make_plan(args, data["train"], data["val"], world.size), gib=gib)
        if gib < (free := free_gib(device)):
            with device:
                model = build_model(args)
            autocast = precision.autocast(args.amp, device)
            seconds = engine.seconds_per_step(model, recipe_of(args), args.batch_size, device, autocast)
            plan = replace(plan, seconds=seconds)
        else:
            computing.append(f"no step is measured: it needs {gib:.2g} GiB, and {free:.2g} are free")
        report["run"] = asdict(plan)
        computing = [*plan.lines(), *computing]
    for line in computing:
        print(line, file=sys.stderr)
    print(json.dumps(report, indent=2))


def set_amp(args, model: FractalGen, device: torch.device, world: dist.World) -> list[str]:
    """Chooses --amp, where it is not given, by a measurement on the first process. Says why."""
    if args.amp is not None:
        return []
    num_images = None if args.evaluate_gen or args.sweep else args.batch_size
    args.amp, reason = dist.on_main(world, lambda: choose_model_amp(model, device, num_images))
    return [f"--amp {args.amp}: {reason}"]


def recipe_of(args) -> engine.Recipe:
    return from_flags(engine.Recipe, args, ema_decay=args.ema_decay if args.ema else None)


def open_loader(args, dataset: ImageDataset, batch_size: int, device, world: dist.World) -> ImageLoader:
    return make_loader(
        dataset, batch_size, world, shuffled=dataset.training, num_workers=args.num_workers,
        pin_memory=args.pin_mem and device.type != "cpu",
    )  # fmt: skip


def evaluate(
    args, model: FractalGen, data, output_dir: Path | None, device, world, measure, generate,
    computing: list[str],
) -> None:  # fmt: skip
    """--evaluate_nll and --evaluate_gen: prints a JSON line each. --sweep: see evaluation/sweep.py."""
    path, args.ema = checkpoint.load_model(model, args.resume, args.ema) if args.resume else (None, False)
    say = lambda line: print(line, file=sys.stderr) if world.is_main else None  # noqa: E731
    loader = open_loader(args, data["val"], args.nll_bsz, device, world) if data else None
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
    args, model: FractalGen, source: Source | None, data, output_dir: Path | None, device, autocast, world,
    measure, generate, computing: list[str],
) -> None:  # fmt: skip
    train_set, val_set = data["train"], data["val"]
    if train_set.classes != val_set.classes:
        raise UserError(f"{args.data_path}: train/ and val/ have different classes")
    loader = open_loader(args, train_set, args.batch_size, device, world)
    val_loader = open_loader(args, val_set, args.nll_bsz, device, world)
    about = make_plan(args, train_set, val_set, world.size).lines() if world.is_main else []
    if args.finetune and not goes_on(args):
        about += finetune.begin(model, source, args.class_names)

    def measure_all(models, step: int, log) -> dict[str, float]:
        """Bits/dim of the validation images and a grid of samples; with --online_eval also numbered PNGs.

        `models` are pairs of a kind of weights and a model. Only the first one is scored in full.
        """
        scores = {}
        for number, (weights, model) in enumerate(models):
            measured = measure(model, val_loader, log.note)
            bits = measured["bits_per_dim"]
            if world.is_main:
                title = ", ".join(filter(None, (f"step {step}", weights, f"{bits:.3f} bits/dim")))
                sheet = draw_sheet(model, train_set.classes, title, sampling_options(args), args.seed)
                log.image(step, "samples_raw" if number else "samples", sheet)
            scores |= {"raw_bits_per_dim": bits} if number else measured
            dist.barrier()
            if args.online_eval and not number:
                log.note(f"images: {generate(model, output_dir / f'generated-{step:07d}', step=step)}")
        return {name: x for name, x in scores.items() if isinstance(x, (int, float))}

    engine.Training(
        model, loader, measure_all, recipe_of(args), from_flags(engine.SavePolicy, args),
        output_dir=output_dir, resume_from=args.resume, start_epoch=args.start_epoch, seed=args.seed,
        flags=args, about=[*about, *computing], half=args.amp == "fp16",
        sharded=divide(args, model, device), device=device, autocast=autocast, world=world,
    ).run()  # fmt: skip


if __name__ == "__main__":
    main()
