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
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import engine_fractalgen as engine
from models import fractalgen
from models.flops import cost_report
from models.guidance import SCHEDULES, Guidance
from models.layers import Block, RotaryBlock
from models.sampling import validate_num_iters
from util import checkpoint, dist
from util.data import PictureLoader, PictureSet, find_bad, make_loader, open_split
from util.errors import UserError
from util.flags import get_args_parser, has_bf16, make_writable, provenance
from util.meters import RunLog
from util.visualize import make_sheet


def main(argv: list[str] | None = None) -> None:
    """The command line. Bad input ends it with one line and exit status 2."""
    parser = get_args_parser(__doc__, tuple(fractalgen.PRESETS), SCHEDULES)
    args = parser.parse_args(argv)
    try:
        run(args)
    except UserError as error:  # from a data worker it arrives wrapped in that process's traceback
        parser.error(str(error).strip().splitlines()[-1].removeprefix("util.errors.UserError: "))
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
            print(json.dumps({**provenance(args), **cost_report(model, args.batch_size)}, indent=2))
        return
    output_dir = make_writable(args.output_dir)
    torch.manual_seed(args.seed + world.rank)
    np.random.seed(args.seed + world.rank)
    random.seed(args.seed + world.rank)
    dist.connect(world, device, args.dist_url)
    if world.is_main:
        (output_dir / "settings.json").write_text(json.dumps(provenance(args), indent=2) + "\n")
    autocast = nullcontext()
    if args.amp != "off":
        autocast = torch.autocast(device.type, torch.bfloat16 if args.amp == "bf16" else torch.float16)
    job = Job(args, model, device, autocast, world, output_dir)
    if args.evaluate_nll or args.evaluate_gen:
        job.evaluate()
    else:
        Training(job).run()


RANGES = {
    "batch_size accum_iter epochs save_last_freq eval_freq nll_bsz nll_forward_number": (1, math.inf),
    "num_images gen_bsz chunk": (1, math.inf),
    "class_num start_epoch num_workers warmup_epochs lr blr min_lr weight_decay r_weight": (0, math.inf),
    "grad_clip": (1e-6, math.inf),
    "attn_dropout proj_dropout label_drop_prob ema_decay": (0, 1),
    "seed": (0, 2**31),  # NumPy's and torch's generators both take these, and a few more for the processes
}  # fmt: skip


def resolve(args: argparse.Namespace, world: dist.World) -> torch.device:
    """Fills in what the flags leave open, checks what can be checked without data, and returns the device."""
    found = torch.accelerator.current_accelerator(check_available=True)
    args.device = args.device or (found.type if found else "cpu")
    try:
        device = torch.device(args.device)
        usable = device.type == "cpu" or (found is not None and found.type == device.type)
    except RuntimeError:
        usable = False
    if not usable:
        raise UserError(f"--device {args.device}: torch finds no such device here; leave it out or give cpu")
    if device.type != "cpu":
        index = world.local_rank if world.size > 1 or device.index is None else device.index
        if index >= (count := torch.accelerator.device_count()):
            raise UserError(f"--device {args.device}: number {index} of {count}; start at most one process a device")
        torch.accelerator.set_device_index(index)
        device = torch.device(device.type, index)
    args.amp = args.amp or ("bf16" if has_bf16(device) else "off")
    preset = fractalgen.PRESETS[args.model]
    if args.img_size not in (None, preset.sizes[0]):
        raise UserError(f"--img_size {args.img_size} contradicts --model {args.model}, which has {preset.sizes[0]}")
    args.img_size, args.num_iter_list = preset.sizes[0], args.num_iter_list or preset.steps
    args.lr = args.lr if args.lr is not None else args.blr * args.batch_size * args.accum_iter * world.size / 256
    for names, (low, high) in RANGES.items():
        for name in names.split():
            if (value := getattr(args, name)) is not None and not low <= value <= high:
                bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                raise UserError(f"--{name} {value} must be {bounds}")
    if args.class_num == 0 and args.cfg != 1:
        raise UserError(f"--cfg {args.cfg} needs classes; with --class_num 0 leave it out")
    if (args.evaluate_gen or args.online_eval) and args.num_images % max(args.class_num, 1):
        raise UserError(
            f"--num_images {args.num_images} must be a multiple of --class_num {args.class_num}: the same for each class"
        )
    try:
        validate_num_iters(args.num_iter_list, len(preset.sizes) - 1)
        Guidance.create(args.cfg, args.cfg_schedule, args.temperature, args.filter_threshold)
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
            args.num_iter_list, args.cfg, args.cfg_schedule, args.temperature, args.filter_threshold, args.chunk, args.compile
        )

    def data(self, split: str) -> PictureSet:
        args, training = self.args, split == "train"
        source = open_split(Path(args.data_path), split)
        dataset = PictureSet(
            source, args.img_size, seed=args.seed, flip=training and args.flip, fast=training and args.fast_decode,
            replace_bad=training,
        )  # fmt: skip
        if (found := len(source.classes)) != args.class_num:
            what = f"{args.data_path}: {split} ({source.kind}) has {found} classes but --class_num is {args.class_num}"
            raise UserError(what if found else f"{what}; give --class_num 0 for an unconditional model")
        if args.strict_data and (bad := find_bad(source, self.world, args.num_workers, self.world.is_main)):
            raise UserError(f"--strict_data: {len(bad)} bad picture(s) in {split}, the first: {bad[0]}")
        return dataset

    def loader(self, dataset: PictureSet, batch_size: int, shuffled: bool) -> PictureLoader:
        pin = self.args.pin_mem and self.device.type != "cpu"
        workers = self.args.num_workers
        return make_loader(dataset, batch_size, self.world, shuffled=shuffled, num_workers=workers, pin_memory=pin)

    def tell_bad(self, loader: PictureLoader, say: Callable[[str], None]) -> int:
        """Names the bad pictures that were met since the last call. Returns how many there are by now."""
        new = loader.gather_bad()
        for number, line in enumerate(new, len(loader.known_bad) - len(new) + 1):
            say(f"bad picture {number}, skipped: {line}")
        return len(loader.known_bad)

    def nll(self, model: fractalgen.FractalGen, loader: PictureLoader, say: Callable[[str], None]) -> dict[str, float]:
        """compute_nll of the pictures that can be read, and how many cannot."""
        scores = engine.compute_nll(
            model, loader, passes=self.args.nll_forward_number, seed=self.args.seed,
            device=self.device, autocast=self.autocast, world=self.world,
        )  # fmt: skip
        return {**scores, "num_bad_pictures": self.tell_bad(loader, say)}

    def generate(self, model: fractalgen.FractalGen, folder: Path) -> dict[str, float]:
        return engine.evaluate(
            model, folder, self.settings, num_images=self.args.num_images, batch_size=self.args.gen_bsz,
            seed=self.args.seed, autocast=self.autocast, world=self.world,
        )  # fmt: skip

    def evaluate(self) -> None:
        """--evaluate_nll and --evaluate_gen: prints a JSON line each."""
        args = self.args
        if args.resume:
            path = checkpoint.locate(args.resume)
            content = checkpoint.load(path)
            if args.ema and not content.get("model_ema"):
                raise UserError(f"{path}: holds no averaged weights 'model_ema'; leave out --ema")
            checkpoint.load_weights(self.model, content["model_ema" if args.ema else "model"], path)
        elif self.world.is_main:
            print("no --resume: the weights are random", file=sys.stderr)
        if args.evaluate_nll:
            pictures = self.data("val")
            say = lambda line: print(line, file=sys.stderr) if self.world.is_main else None  # noqa: E731
            say(f"{args.data_path}: {pictures.source.kind}, {len(pictures)} pictures in val")
            scores = self.nll(self.model, self.loader(pictures, args.nll_bsz, shuffled=False), say)
            if self.world.is_main:
                print(json.dumps(scores))
        if args.evaluate_gen:
            folder = self.output_dir / "generated"
            scores = self.generate(self.model, folder)
            if self.world.is_main:
                print(json.dumps({**scores, "folder": str(folder)}))


class Training:
    """A job's training: optimiser, scaler and average, the loop over epochs, saving and resuming."""

    def __init__(self, job: Job):
        args, model = job.args, job.model
        self.job, self.last_checkpoint = job, "none yet"
        train_set, val_set = job.data("train"), job.data("val")
        if train_set.classes != val_set.classes:
            raise UserError(f"{args.data_path}: train/ and val/ have different classes")
        self.train_loader = job.loader(train_set, args.batch_size, shuffled=True)
        self.val_loader = job.loader(val_set, args.nll_bsz, shuffled=False)
        batches = len(self.train_loader.batch_sampler)
        if batches < args.accum_iter:
            raise UserError(f"--accum_iter {args.accum_iter} is more than the {batches} batches of an epoch")
        self.steps = batches // args.accum_iter  # an epoch
        if args.compile:
            for module in model.modules():
                if isinstance(module, (Block, RotaryBlock)):
                    module.compile(dynamic=True)  # the number of masked patches differs from step to step
        self.optimizer = torch.optim.AdamW(
            engine.add_weight_decay(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.95), fused=True
        )
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=args.amp == "fp16")
        self.ema = None
        if args.ema:
            from timm.utils import ModelEmaV3

            self.ema = ModelEmaV3(model, decay=args.ema_decay)

    def run(self) -> None:
        args, job = self.job.args, self.job
        with RunLog(job.output_dir, enabled=job.world.is_main) as log:
            first_epoch = self.resume(log)
            train, val = (loader.dataset for loader in (self.train_loader, self.val_loader))
            kinds = " and ".join(dict.fromkeys(data.source.kind for data in (train, val)))
            log.note(f"{args.data_path}: {kinds}, {len(train.classes)} classes, {len(train)} + {len(val)} pictures")
            log.say(f"{self.steps} steps an epoch, log: {job.output_dir}")
            model: nn.Module = job.model
            if job.world.size > 1:
                model = DistributedDataParallel(model, device_ids=None if job.device.index is None else [job.device.index])
            recipe = engine.Recipe(
                args.lr, args.min_lr, args.lr_schedule, args.warmup_epochs, args.epochs, args.grad_clip, args.accum_iter
            )
            for epoch in range(first_epoch, args.epochs):
                engine.train_one_epoch(
                    model, self.train_loader, self.optimizer, self.scaler, recipe,
                    epoch=epoch, device=job.device, autocast=job.autocast, world=job.world, log=log, ema=self.ema,
                    last_checkpoint=self.last_checkpoint,
                )  # fmt: skip
                if bad := job.tell_bad(self.train_loader, log.note):
                    log.record((epoch + 1) * self.steps, {"train/bad_pictures": bad})
                final = epoch + 1 == args.epochs
                if (epoch + 1) % args.save_last_freq == 0 or final:
                    self.save(epoch)
                if (epoch + 1) % args.eval_freq == 0 or final:
                    with torch.compiler.set_stance("force_eager"):  # sampling has too many shapes to compile
                        self.evaluate((epoch + 1) * self.steps, log)

    def evaluate(self, step: int, log: RunLog) -> None:
        """Bits/dim of the validation pictures and a grid of samples; with --online_eval also the numbered PNGs.

        Draws from no global generator, so that a run does not depend on how often it is evaluated.
        """
        job, args = self.job, self.job.args
        model = self.ema.module if self.ema else job.model
        log.record(step, {f"val/{name}": value for name, value in job.nll(model, self.val_loader, log.note).items()})
        if job.world.is_main:
            classes = np.linspace(0, max(args.class_num - 1, 0), num=16).astype(int).tolist()
            pictures = engine.draw(model, classes, range(16), job.settings, args.seed, job.autocast)
            sheet = make_sheet(pictures, columns=8)
            log.picture(step, "samples", sheet)
            sheet.save(job.output_dir / f"samples-{step:07d}.png")
        dist.barrier()
        if args.online_eval:
            log.say(f"pictures: {job.generate(model, job.output_dir / f'generated-{step:07d}')}")

    def save(self, epoch: int) -> None:
        """Epoch `epoch` is finished; `batch` is the number of batches done of the one after it."""
        job = self.job
        states = dist.gather(checkpoint.random_state(job.device))
        path = job.output_dir / checkpoint.NAME
        if job.world.is_main:
            content = {
                "model": job.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "epoch": epoch,
                "scaler": self.scaler.state_dict(),
                "args": job.args,
                "step": (epoch + 1) * self.steps,
                "batch": 0,
                "random": states,
            }
            if self.ema:
                content["model_ema"] = self.ema.module.state_dict()
            checkpoint.save(path, content)
        self.last_checkpoint = f"{path} (epoch {epoch})"
        dist.barrier()

    def resume(self, log: RunLog) -> int:
        """Takes up --resume, if there is something, and returns the epoch to begin with."""
        job, args = self.job, self.job.args
        if not args.resume:
            return args.start_epoch
        path = checkpoint.locate(args.resume)
        if not path.exists() and path.parent.resolve() == job.output_dir.resolve():
            log.say(f"{path} does not exist yet: starting afresh")
            return args.start_epoch
        content = checkpoint.load(path)
        checkpoint.load_weights(job.model, content["model"], path)
        if self.ema:
            self.ema.module.load_state_dict(content.get("model_ema") or content["model"])
        if not {"optimizer", "epoch"} <= content.keys():
            log.say(f"{path} holds weights only: starting from them at epoch {args.start_epoch}")
            return args.start_epoch
        for group in content["optimizer"]["param_groups"]:  # a published file knows nothing of the fused kernel
            group.update(fused=True, foreach=None)
        self.optimizer.load_state_dict(content["optimizer"])
        if content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        self.train_loader.batch_sampler.start = content.get("batch", 0)
        states = content.get("random", [])
        if len(states) == job.world.size:
            checkpoint.set_random_state(states[job.world.rank], job.device)
        else:
            log.say(f"{path} has the random state of {len(states)} processes, not {job.world.size}: masks will differ")
        self.last_checkpoint = f"{path} (epoch {content['epoch']})"
        log.say(f"resumed {path} after epoch {content['epoch']}")
        return content["epoch"] + 1


if __name__ == "__main__":
    main()
