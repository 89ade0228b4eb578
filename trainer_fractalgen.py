"""A run of training: optimiser, scaler and average, the loop over epochs, saving, stopping and going on."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import engine_fractalgen as engine
from models.layers import Block, RotaryBlock
from util import checkpoint, dist
from util.errors import UserError, one_line
from util.files import write_json
from util.flags import provenance
from util.meters import BadSteps, RunLog
from util.pixels import make_sheet
from util.signals import Interrupt, Interrupted

SETTINGS = "settings.json"


class Training:
    """What a job (main_fractalgen.Job) does without --evaluate_…; `run` does it.

    Where the run is: `step` optimiser steps are done, and `place`, the number of an epoch and of its images that are done.
    """

    def __init__(self, job):
        args, model = job.args, job.model
        self.job, self.step, self.place, self.saved_step = job, 0, (args.start_epoch, 0), None
        self.resumed_step, self.bad_steps = None, BadSteps(job.device)
        self.origin = dist.on_main(job.world, self.find_origin)
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
        job = self.job
        with RunLog(job.output_dir, enabled=job.world.is_main) as self.log, Interrupt() as self.interrupt:
            self.resume()
            dist.barrier()  # all have read what the first is about to tidy up and to write
            if job.world.is_main:
                checkpoint.clean(job.output_dir)
                if not (dist.restarts() and self.began_here()):
                    write_json(job.output_dir / SETTINGS, {**provenance(job.args), "job": dist.job()})
            train, val = (loader.dataset for loader in (self.train_loader, self.val_loader))
            kinds = " and ".join(dict.fromkeys(data.source.kind for data in (train, val)))
            self.log.note(
                f"{job.args.data_path}: {kinds}, {len(train.classes)} classes, {len(train)} + {len(val)} images"
            )
            self.log.say(f"{self.steps} steps an epoch, log: {job.output_dir}")
            try:
                self.epochs()
            except Interrupted as interrupted:
                self.log.say(f"{interrupted} at step {self.step}: stopped; --resume {job.output_dir} goes on")

    def epochs(self) -> None:
        args, job = self.job.args, self.job
        model: nn.Module = job.model
        if job.world.size > 1:
            model = DistributedDataParallel(
                model, device_ids=None if job.device.index is None else [job.device.index]
            )
        recipe = engine.Recipe(
            args.lr,
            args.min_lr,
            args.lr_schedule,
            args.warmup_epochs,
            args.epochs,
            args.grad_clip,
            args.accum_iter,
        )
        first_epoch, self.train_loader.batch_sampler.start = self.place
        for epoch in range(first_epoch, args.epochs):
            engine.train_one_epoch(
                model, self.train_loader, self.optimizer, self.scaler, recipe,
                epoch=epoch, device=job.device, autocast=job.autocast, world=job.world, log=self.log, ema=self.ema,
                bad=self.bad_steps, max_bad_steps=args.max_bad_steps, after_step=partial(self.after_step, epoch),
            )  # fmt: skip
            final, end = epoch + 1 == args.epochs, (epoch + 1) * self.steps
            if bad := job.tell_bad(self.train_loader, self.log.note):
                self.log.record(end, {"train/bad_images": bad})
            evaluate = ((epoch + 1) % args.eval_freq == 0 or final) and not self.evaluated(end)
            if (epoch + 1) % args.save_last_freq == 0 or evaluate or final:
                self.save(final)
            if evaluate:
                self.evaluate(end)

    def after_step(self, epoch: int, images: int) -> None:
        """Saves where it is time to, and stops all processes after the same step where one was told to."""
        self.step, self.place = self.step + 1, (epoch, images)
        signum, every = self.interrupt.agreed(), self.job.args.save_every_steps
        if signum or (every and self.step % every == 0):
            self.save(final=bool(signum))
        if signum:
            raise Interrupted(self.interrupt.name(signum))

    def evaluated(self, step: int) -> bool:
        """Whether the run that was resumed here, and not trained since, had its evaluation: its log says so."""
        return self.step == self.resumed_step and dist.gather(self.log.has(step, "val/bits_per_dim"))[0]

    def evaluate(self, step: int) -> None:
        """Bits/dim of the validation images and a grid of samples; with --online_eval also the numbered PNGs.

        Draws from no global generator, so that a run does not depend on how often it is evaluated. The checkpoint is
        written before, so that a signal can end it at any moment.
        """
        job, args, log = self.job, self.job.args, self.log
        model = self.ema.module if self.ema else job.model
        with (
            self.interrupt.immediately(),
            torch.compiler.set_stance("force_eager"),
        ):  # too many shapes to compile
            scores = job.nll(model, self.val_loader, log.note)
            if job.world.is_main:
                classes = np.linspace(0, max(args.class_num - 1, 0), num=16).astype(int).tolist()
                images = engine.draw(model, classes, range(16), job.settings, args.seed, job.autocast)
                log.image(step, "samples", make_sheet(images, columns=8))
            dist.barrier()
            if args.online_eval:
                log.note(f"images: {job.generate(model, job.output_dir / f'generated-{step:07d}', step)}")
            log.record(step, {f"val/{name}": value for name, value in scores.items()})

    def save(self, final: bool) -> None:
        """A checkpoint of now. Where it cannot be written, training goes on or ends, as --on_save_error says; a final
        one that is not written is an error."""
        if self.step == self.saved_step:
            return
        job, (epoch, images), error = self.job, self.place, None
        states = dist.gather(checkpoint.random_state(job.device))
        if job.world.is_main:
            per_step = job.args.accum_iter * self.train_loader.batch_sampler.together
            finished = -(-images // per_step) >= self.steps
            content = {
                "model": job.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "epoch": epoch if finished else epoch - 1,
                "scaler": self.scaler.state_dict(),
                "args": job.args,
                "step": self.step,
                "place": self.place,
                "random": states,
                "run": self.bits(),
            }
            if self.ema:
                content["model_ema"] = self.ema.module.state_dict()
            try:
                checkpoint.save(job.output_dir, content, job.args.keep_last)
            except OSError as failed:
                error = f"{job.output_dir}: the checkpoint of step {self.step} could not be written ({failed.strerror or failed})"
        error = dist.gather(error)[0]
        if error is None:
            self.saved_step = self.step
        elif final or job.args.on_save_error == "stop":
            raise UserError(f"{error}; what was there before is whole")
        else:
            self.log.say(
                f"{error}; what was there before is whole, training goes on (--on_save_error continue)"
            )

    def find_origin(self) -> Path | None:
        """The checkpoint to go on from: --resume; after torchrun's restart what this job has written itself; or none."""
        job, args = self.job, self.job.args
        own, path = job.output_dir / checkpoint.NAME, checkpoint.locate(args.resume) if args.resume else None
        found = checkpoint.exists(own)
        if dist.restarts() and found and self.began_here():
            newest = max(file.stat().st_mtime_ns for file in checkpoint.candidates(own))
            if newest >= (job.output_dir / SETTINGS).stat().st_mtime_ns:  # saved since it began
                return own
        at_home = path is not None and path.parent.resolve() == job.output_dir.resolve()
        if found and not at_home:
            raise UserError(
                f"--output_dir {job.output_dir} holds the checkpoints of another run; give --resume {job.output_dir} to go on "
                "with it, or another --output_dir"
            )
        return None if at_home and path.name == own.name and not found else path

    def began_here(self) -> bool:
        """Whether the run in the output folder was begun by this very job, before torchrun restarted it."""
        try:
            return json.loads((self.job.output_dir / SETTINGS).read_text())["job"] == dist.job()
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def resume(self) -> None:
        """Takes up the checkpoint that there is to go on from, if any."""
        job, args, log = self.job, self.job.args, self.log
        if self.origin is None:
            if args.resume:
                log.say(f"{args.resume} holds no {checkpoint.NAME} yet: starting afresh")
            self.step = args.start_epoch * self.steps
            return
        path, content = self.load(self.origin)
        checkpoint.load_weights(job.model, content["model"], path)
        if self.ema:
            checkpoint.load_weights(self.ema.module, content.get("model_ema") or content["model"], path)
        if not {"optimizer", "epoch"} <= content.keys():
            log.say(f"{path} holds weights only: starting from them at epoch {args.start_epoch}")
            self.step = args.start_epoch * self.steps
            return
        try:
            self.restore(content, path)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise UserError(
                f"{path}: its optimizer or random state is not of such a run ({one_line(error)})"
            ) from error
        self.resumed_step = self.step
        if path.parent.resolve() == job.output_dir.resolve():
            self.saved_step = self.step
        if content.get("model_ema") and not self.ema:
            log.say(f"{path} holds an average, which ends here: without --ema none is kept")
        log.say(
            f"resumed {path} at step {self.step}: epoch {self.place[0]}, {self.place[1]} of its images done"
        )

    def restore(self, content: dict, path: Path) -> None:
        """All but the weights."""
        for group in content["optimizer"][
            "param_groups"
        ]:  # a published file knows nothing of the fused kernel
            group.update(fused=True, foreach=None)
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(content["optimizer"])
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay  # the flag's, not the file's
        if content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        epoch, images = content.get("place", (content["epoch"] + 1, 0))
        self.place = int(epoch), int(images)
        self.step = int(content.get("step", self.place[0] * self.steps))
        self.restore_random(content, path)

    def load(self, path: Path) -> tuple[Path, dict]:
        """The newest whole checkpoint, chosen by the first process for all."""
        chosen = []
        path = dist.on_main(
            self.job.world, lambda: chosen.append(checkpoint.load_newest(path, self.log.say)) or chosen[0][0]
        )
        return chosen[0] if chosen else (path, checkpoint.load(path))

    def bits(self) -> dict[str, int]:
        """What, besides weights and generators, the bits of a run depend on."""
        args = self.job.args
        return {
            "processes": self.job.world.size,
            "threads": torch.get_num_threads(),
            **{name: getattr(args, name) for name in ("batch_size", "accum_iter", "seed")},
        }

    def restore_random(self, content: dict, path: Path) -> None:
        """Every generator's state; says what makes the run another than the one that was not stopped."""
        states, now = content.get("random", []), self.bits()
        before = {**now, "processes": len(states), **content.get("run", {})}
        if len(states) == self.job.world.size:
            checkpoint.set_random_state(states[self.job.world.rank], self.job.device)
        if changes := [
            f"{name} {before[name]}, now {value}" for name, value in now.items() if before[name] != value
        ]:
            self.log.say(
                f"{path} was written with {'; '.join(changes)}: not bit for bit the run that was not stopped"
            )
