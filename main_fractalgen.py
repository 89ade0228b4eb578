"""Train, measure and sample fractal generative models: flags in, one call into the engine.

python main_fractalgen.py --model fractalmar_in64 --data_path IMAGENET ...          one process
torchrun --nproc_per_node=8 main_fractalgen.py --model fractalmar_in64 ...          many
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch

import engine_fractalgen as engine
from evaluation import sweep
from evaluation.cost import cost_report
from evaluation.reference import WHERE
from evaluation.score import scorer_of_flags
from models import fractalgen
from models.sampling.generate import validate_num_iters
from models.sampling.guidance import SCHEDULES, Guidance
from trainer_fractalgen import Training
from util import checkpoint, dist
from util.data.loader import ImageDataset, ImageLoader, find_bad, make_loader, open_split
from util.errors import UserError
from util.files import sha256, write_json
from util.flags import get_args_parser, has_bf16, make_writable, provenance


def main(argv: list[str] | None = None) -> None:
    """The command line. Bad input ends it with one line and exit status 2."""
    parser = get_args_parser(__doc__, tuple(fractalgen.PRESETS), SCHEDULES, engine.LR_SCHEDULES)
    args = parser.parse_args(argv)
    with parser.one_line_errors():
        run(args)
    dist.disconnect()  # not after an error: the other processes may be waiting for us, and leaving frees them


def run(args: argparse.Namespace) -> None:
    world = dist.from_environment(args.dist_on_itp, args.world_size, args.local_rank)
    device = resolve(args, world)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in what autocast leaves in float32
    torch.manual_seed(args.seed)
    with torch.device("meta" if args.dry_run else device):
        model = build_model(args)
    if args.dry_run:
        if world.is_main:
            cost = cost_report(model, args.batch_size, args.num_iter_list, args.cfg != 1, args.refresh)
            print(json.dumps({**provenance(args), **cost}, indent=2))
        return
    output_dir = make_writable(args.output_dir)
    torch.manual_seed(args.seed + world.rank)
    np.random.seed(args.seed + world.rank)
    random.seed(args.seed + world.rank)
    dist.connect(world, device, args.dist_url)
    autocast = nullcontext()
    if args.amp != "off":
        autocast = torch.autocast(device.type, torch.bfloat16 if args.amp == "bf16" else torch.float16)
    job = Job(args, model, device, autocast, world, output_dir)
    if args.evaluate_nll or args.evaluate_gen or args.sweep:
        job.evaluate()
    else:
        Training(job).run()


RANGES = {
    "batch_size accum_iter epochs save_last_freq eval_freq nll_bsz nll_forward_number": (1, math.inf),
    "num_images gen_bsz chunk refresh save_every_steps keep_last": (1, math.inf),
    "class_num max_bad_steps start_epoch num_workers warmup_epochs lr blr min_lr weight_decay r_weight": (0, math.inf),
    "grad_clip": (1e-6, math.inf),
    "attn_dropout proj_dropout label_drop_prob ema_decay": (0, 1),
    "seed": (0, 2**31),  # NumPy's and torch's generators both take these, and a few more for the processes
}  # fmt: skip


def resolve(args: argparse.Namespace, world: dist.World) -> torch.device:
    """Fills in what the flags leave open, checks what can be checked without data, and returns the device."""
    device = dist.pick_device(args.device, world)
    args.device = args.device or device.type
    args.amp = args.amp or ("bf16" if has_bf16(device) else "off")
    preset = fractalgen.PRESETS[args.model]
    if args.img_size not in (None, preset.sizes[0]):
        raise UserError(
            f"--img_size {args.img_size} contradicts --model {args.model}, which has {preset.sizes[0]}"
        )
    args.img_size, args.num_iter_list = preset.sizes[0], args.num_iter_list or preset.steps
    args.lr = (
        args.lr if args.lr is not None else args.blr * args.batch_size * args.accum_iter * world.size / 256
    )
    for names, (low, high) in RANGES.items():
        for name in names.split():
            if (value := getattr(args, name)) is not None and not low <= value <= high:
                bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                raise UserError(f"--{name} {value} must be {bounds}")
    if args.refresh > 1 and preset.generators[0] != "mar":
        raise UserError(
            f"--refresh {args.refresh} is for models whose level 0 is MAR; with --model {args.model} leave it out"
        )
    if args.class_num == 0 and args.nll_labels:
        raise UserError("--nll_labels needs classes; with --class_num 0 leave it out")
    for label in args.class_labels or ():
        if not 0 <= label < args.class_num:
            raise UserError(
                f"--class_labels: {label} is none of the --class_num {args.class_num} classes, which count from 0"
            )
    count, draws = (
        len(args.class_labels or ()) or args.class_num or 1,
        args.evaluate_gen or args.online_eval or args.sweep,
    )
    if draws and args.num_images % count:
        flag = "the number of --class_labels" if args.class_labels else "--class_num"
        raise UserError(
            f"--num_images {args.num_images} must be a multiple of {flag} {count}: the same for each class"
        )
    try:
        validate_num_iters(args.num_iter_list, len(preset.sizes) - 1)
        for cell in sweep.cells(args.sweep or []) or [{}]:
            tried = argparse.Namespace(**{**vars(args), **cell})
            Guidance.create(tried.cfg, tried.cfg_schedule, tried.temperature, tried.filter_threshold)
            if args.class_num == 0 and tried.cfg != 1:
                raise UserError(f"--cfg {tried.cfg} needs classes; with --class_num 0 leave it out")
    except ValueError as error:
        raise UserError(str(error)) from error
    return device


def build_model(args: argparse.Namespace) -> fractalgen.FractalGen:
    try:
        return fractalgen.build(
            args.model,
            guiding_pixel=args.guiding_pixel,
            num_conds=args.num_conds,
            class_num=args.class_num,
            label_drop_prob=args.label_drop_prob,
            attn_dropout=args.attn_dropout,
            proj_dropout=args.proj_dropout,
            r_weight=args.r_weight,
            grad_checkpointing=args.grad_checkpointing,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


class Job:
    """What every run has, and the evaluations; the work is the engine's."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: fractalgen.FractalGen,
        device: torch.device,
        autocast: AbstractContextManager,
        world: dist.World,
        output_dir: Path,
    ):
        self.args, self.model, self.device, self.autocast = args, model, device, autocast
        self.world, self.output_dir = world, output_dir
        self.settings = engine.SamplerSettings(
            args.num_iter_list,
            args.cfg,
            args.cfg_schedule,
            args.temperature,
            args.filter_threshold,
            args.chunk,
            args.compile,
            args.refresh,
        )
        scored = (
            args.evaluate_gen or args.online_eval or args.sweep
        )  # what that lacks is said now, not after hours
        self.scorer = scorer_of_flags(args, device, world) if scored else None

    def data(self, split: str) -> ImageDataset:
        args, training = self.args, split == "train"
        source = open_split(Path(args.data_path), split)
        dataset = ImageDataset(
            source, args.img_size, seed=args.seed, flip=training and args.flip, fast=training and args.fast_decode,
            replace_bad=training,
        )  # fmt: skip
        if (found := len(source.classes)) != args.class_num:
            what = f"{args.data_path}: {split} ({source.kind}) has {found} classes but --class_num is {args.class_num}"
            raise UserError(what if found else f"{what}; give --class_num 0 for an unconditional model")
        if args.strict_data and (bad := find_bad(source, self.world, args.num_workers, self.world.is_main)):
            raise UserError(f"--strict_data: {len(bad)} bad image(s) in {split}, the first: {bad[0]}")
        return dataset

    def loader(self, dataset: ImageDataset, batch_size: int, shuffled: bool) -> ImageLoader:
        pin = self.args.pin_mem and self.device.type != "cpu"
        workers = self.args.num_workers
        return make_loader(
            dataset, batch_size, self.world, shuffled=shuffled, num_workers=workers, pin_memory=pin
        )

    def tell_bad(self, loader: ImageLoader, say: Callable[[str], None]) -> int:
        """Names the bad images that were met since the last call. Returns how many there are by now."""
        new = loader.gather_bad()
        for number, line in enumerate(new, len(loader.known_bad) - len(new) + 1):
            say(f"bad image {number}, skipped: {line}")
        return len(loader.known_bad)

    def nll(
        self, model: fractalgen.FractalGen, loader: ImageLoader, say: Callable[[str], None]
    ) -> dict[str, float]:
        """The single figures of `likelihood`."""
        return {
            name: x for name, x in self.likelihood(model, loader, say).items() if isinstance(x, (int, float))
        }

    def likelihood(
        self, model: fractalgen.FractalGen, loader: ImageLoader, say: Callable[[str], None]
    ) -> dict:
        """compute_nll of the images that can be read, and how many cannot."""
        args = self.args
        scores = engine.compute_nll(
            model, loader, passes=args.nll_forward_number, seed=args.seed, conditional=args.nll_labels,
            num_iter_list=args.num_iter_list if args.nll_schedule else None,
            device=self.device, autocast=self.autocast, world=self.world,
        )  # fmt: skip
        return {**scores, "num_bad_images": self.tell_bad(loader, say)}

    def generate(self, model: fractalgen.FractalGen, folder: Path, step: int = 0) -> dict[str, float | None]:
        """Numbered PNGs in `folder`, of that step of training, and their scores where there is a reference."""
        figures = engine.evaluate(
            model, folder, self.settings, num_images=self.args.num_images, batch_size=self.args.gen_bsz,
            seed=self.args.seed, autocast=self.autocast, world=self.world, classes=self.args.class_labels,
            notes={"begun_by": provenance(self.args)}, say=lambda line: print(line, file=sys.stderr),
        )  # fmt: skip
        if self.scorer is None:
            return figures
        return {**figures, **self.scorer.publish(folder, self.args, self.output_dir, step=step)}

    def evaluate(self) -> None:
        """--evaluate_nll and --evaluate_gen: prints a JSON line each. --sweep: see sweep_fractalgen."""
        args, path = self.args, None
        if args.resume:
            path = checkpoint.locate(args.resume)
            content = checkpoint.load(path)
            if args.ema and not content.get("model_ema"):
                raise UserError(f"{path}: holds no averaged weights 'model_ema'; leave out --ema")
            checkpoint.load_weights(self.model, content["model_ema" if args.ema else "model"], path)
        elif self.world.is_main:
            print("no --resume: the weights are random", file=sys.stderr)
        if args.evaluate_nll:
            images = self.data("val")
            say = lambda line: print(line, file=sys.stderr) if self.world.is_main else None  # noqa: E731
            say(f"{args.data_path}: {images.source.kind}, {len(images)} images in val")
            scores = self.likelihood(self.model, self.loader(images, args.nll_bsz, shuffled=False), say)
            if self.world.is_main:
                scores = {name: None if x != x else x for name, x in scores.items()}  # JSON knows no nan
                print(json.dumps(scores), flush=True)
                used = {"path": str(path), "sha256": sha256(path), "ema": args.ema} if path else None
                data = {"path": args.data_path, "kind": images.source.kind, "num_images": len(images)}
                about = {"checkpoint": used, "data": data, **provenance(args), "processes": self.world.size}
                write_json(self.output_dir / "nll.json", {**scores, **about})
        if args.evaluate_gen:
            folder = self.output_dir / "generated"
            scores = self.generate(self.model, folder)
            if self.world.is_main:
                print(json.dumps({**scores, "folder": str(folder)}))
                if self.scorer is None:
                    print(f"no --fid_stats: the images are not scored; {WHERE}", file=sys.stderr)
        if args.sweep:
            sweep.run(self)


if __name__ == "__main__":
    main()
