"""Training: epochs, evaluation, saving, resuming (docs/format.md, "Training recipe")."""

import argparse
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from evaluation.images import evaluate  # noqa: F401  a published name of this module
from evaluation.nll import compute_nll  # noqa: F401  a published name of this module
from models.fractalgen import FractalGen
from util import dist
from util.data.loader import ImageLoader
from util.dist import World
from util.errors import UserError
from util.run import plan
from util.run.folder import sole_run
from util.run.meters import PeakMemory, RunLog, Window
from util.run.optimizer import BETAS, MuonAdamW
from util.run.recipe import LR_SCHEDULES, Recipe, SavePolicy  # noqa: F401
from util.run.signals import Interrupt, Interrupted
from util.run.state import RunState
from util.run.watch import Diverged, LossWatch

LOG_EVERY = 20  # steps; the only places in an epoch where the host waits for the device


def add_weight_decay(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's groups in published order: undecayed (1-D, or named *.bias), then decayed."""
    undecayed, decayed = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (undecayed if p.dim() <= 1 or name.endswith(".bias") else decayed).append(p)
    return [{"params": undecayed, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups = add_weight_decay(model, recipe.weight_decay)
    if recipe.optimizer == "muon":
        return MuonAdamW(model, groups, lr=recipe.lr)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=BETAS, fused=True)


def train_one_epoch(
    model: nn.Module,
    loader: ImageLoader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    recipe: Recipe,
    *,
    epoch: int,
    device: torch.device,
    autocast: AbstractContextManager,
    world: World,
    log: RunLog,
    ema: nn.Module | None = None,
    watch: LossWatch | None = None,
    after_step: Callable[[int], None] = lambda images: None,
) -> dict[str, float]:
    """Trains on the rest of epoch number `epoch` (from 0), from the loader's BatchOrder.start on.

    model       a FractalGen, bare, sharded or in DDP; optimizer: a fused one
    ema         the average of the weights, updated after each step: timm's ModelEmaV3
    watch       judges the losses, over epochs; a step whose loss or gradient is not finite changes no weight
    after_step  called with the number of images of this epoch that all processes have done

    Returns the mean loss and images a second. Raises Diverged after more than `recipe.max_bad_steps` steps in
    a row that were not finite, and where the loss is far above its recent median for long.
    """
    model.train()
    order = loader.batch_sampler
    order.epoch = epoch
    images = order.together * recipe.accum_iter  # in a step
    steps, done = len(order) // recipe.accum_iter, order.start
    first_step = -(-done // images)
    batches = iter(loader) if first_step < steps else None
    order.start = 0
    log.start_epoch(epoch, recipe.epochs, steps, first_step)
    watch = LossWatch() if watch is None else watch
    window, windows, began, memory = Window(device), [], time.perf_counter(), PeakMemory(device)
    for step in range(first_step, steps):
        lr = recipe.learning_rate(epoch + step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        mean_loss, grad_norm = train_step(model, batches, optimizer, scaler, recipe, window, device, autocast)
        watch.note(mean_loss, grad_norm, epoch * steps + step)
        if ema is not None:
            raw = model.module if isinstance(model, DistributedDataParallel) else model
            ema.update(raw, step=epoch * steps + step + 1)
        log.step(mean_loss, images)
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            means, now = window.read(), time.perf_counter()  # sync
            watch.read()
            recipe.check(watch, steps)
            seen = window.images * world.size
            windows.append((means["loss"] * seen, seen, now - began))
            means |= {"lr": lr, "grad_norm": grad_norm.item(), "images_per_s": seen / (now - began)}
            means |= {"skipped_steps": watch.skipped, "memory_gib": memory.gib()}
            log.record(epoch * steps + step + 1, {f"train/{name}": value for name, value in means.items()})
            window, began = Window(device), now
        done += images
        after_step(done)
    loss, seen, secs = map(sum, zip(*(windows or [(math.nan, 1, math.nan)]), strict=True))
    return {"loss": loss / seen, "images_per_s": seen / secs}


def train_step(
    model, batches, optimizer, scaler, recipe: Recipe, window: Window, device, autocast
) -> tuple[Tensor, Tensor]:
    """One optimiser step over `accum_iter` batches, noted in `window`.

    Returns its mean loss and the unclipped gradient norm. Where that norm is not finite, on whichever
    process, no weight changes; the device decides it without the host.
    """
    mean_loss, alphabet = 0.0, getattr(model, "module", model).alphabet
    for micro in range(recipe.accum_iter):
        values, labels, _ = next(batches)
        images = alphabet.normalize(values.to(device, non_blocking=True))
        labels = labels.to(device, non_blocking=True)
        accumulate = isinstance(model, DistributedDataParallel) and micro + 1 < recipe.accum_iter
        with model.no_sync() if accumulate else nullcontext():
            with autocast:
                loss, terms = model(images, labels, return_terms=True)
            finite = torch.where(loss.detach().isfinite(), 1.0, math.nan)  # nan for every process's gradient
            scaler.scale(loss * finite / recipe.accum_iter).backward()
        window.add(loss, terms, len(images))
        mean_loss = mean_loss + loss.detach().float() / recipe.accum_iter
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
    grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm  # if sharded
    if scaler.is_enabled():  # it skips such a step by itself
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.found_inf = (~grad_norm.isfinite()).float()  # as the scaler tells a fused optimiser
        optimizer.step()
        del optimizer.found_inf
    optimizer.zero_grad()
    return mean_loss, grad_norm


def seconds_per_step(
    model: FractalGen, recipe: Recipe, batch_size: int, device: torch.device, autocast
) -> float:
    """Measures an optimiser step of one process, on random images (see `plan.measure`). Changes the model."""
    model.train()
    optimizer, scaler = make_optimizer(model, recipe), torch.amp.GradScaler(device.type, enabled=False)
    one, alphabet = replace(recipe, accum_iter=1), model.alphabet

    def step(images: int) -> None:
        shape = images, alphabet.channels, *model.image_shape
        values = torch.randint(alphabet.num_values, shape, dtype=alphabet.dtype)
        batches = iter([(values, torch.zeros(images, dtype=torch.int64), None)])
        loss, _ = train_step(model, batches, optimizer, scaler, one, Window(device), device, autocast)
        loss.item()  # sync

    return plan.measure(step, batch_size) * recipe.accum_iter


class Training:
    """A training run in `output_dir`, or, if that is None, one that saves nothing; `run` does it.

    loader       the training images
    measure      called with (models, step, log) at the end of epochs; returns scores by name. The models come
                 after their kind of weights. The first one's bits_per_dim says how good the run is; a second
                 one, the raw weights before their average has caught up, gives raw_bits_per_dim
    resume_from  the checkpoint, or the folder of one, to continue from; "" for none
    flags        only recorded, in settings.json and in checkpoints; `about` are lines for the log
    half         whether autocast is float16, whose gradients need to be scaled
    sharded      the `Sharded` of a sharded model, or None
    """

    def __init__(
        self, model: FractalGen, loader: ImageLoader,
        measure: Callable[[Iterable, int, RunLog], dict], recipe: Recipe, policy: SavePolicy,
        *, output_dir: Path | None, resume_from: str, start_epoch: int, seed: int, flags: argparse.Namespace,
        about: list[str], half: bool, device: torch.device, autocast: AbstractContextManager, world: World,
        sharded=None,
    ):  # fmt: skip
        self.model, self.loader, self.measure, self.recipe = model, loader, measure, recipe
        self.policy, self.output_dir, self.resume_from, self.flags = policy, output_dir, resume_from, flags
        self.about, self.device, self.autocast, self.world = about, device, autocast, world
        self.save_is_due = False
        order = loader.batch_sampler
        if len(order) < recipe.accum_iter:
            raise UserError(f"--accum_iter {recipe.accum_iter}: an epoch has only {len(order)} batches")
        self.state = RunState(
            model, make_optimizer(model, recipe), world, half=half, ema_decay=recipe.ema_decay,
            start_epoch=start_epoch, steps=len(order) // recipe.accum_iter,
            images=order.together * recipe.accum_iter,
            bits={"batch_size": order.batch_size, "accum_iter": recipe.accum_iter, "seed": seed},
            sharded=sharded,
        )  # fmt: skip

    def run(self) -> None:
        folder, world, state = self.output_dir, self.world, self.state
        with (
            sole_run(folder, world, print),
            RunLog(folder, enabled=world.is_main) as self.log,
            Interrupt() as self.interrupt,
        ):
            state.begin(self.resume_from, folder, self.flags, self.log.say)
            for line in self.about:
                self.log.note(line)
            self.log.say(f"{state.steps} steps an epoch, log: {folder or 'none'}")
            try:
                self.epochs()
            except Interrupted as interrupted:
                goes_on = f"--resume {folder} goes on" if folder else "nothing is saved"
                self.log.say(f"{interrupted} at step {state.step}: stopped; {goes_on}")
            except Diverged as error:
                advice = dist.on_main(world, lambda: state.go_back(folder))
                raise UserError(f"{error}; {advice}") from error
            self.report(state.finish(folder), final=True)

    def epochs(self) -> None:
        model, state, policy, epochs = self.model, self.state, self.policy, self.recipe.epochs
        if self.world.size > 1 and state.sharded is None:
            index = self.device.index
            model = DistributedDataParallel(model, device_ids=None if index is None else [index])
        first_epoch, self.loader.batch_sampler.start = state.place
        for epoch in range(first_epoch, epochs):
            train_one_epoch(
                model, self.loader, state.optimizer, state.scaler, self.recipe, epoch=epoch,
                device=self.device, autocast=self.autocast, world=self.world, log=self.log, ema=state.ema,
                watch=state.watch, after_step=partial(self.after_step, epoch),
            )  # fmt: skip
            final, end = epoch + 1 == epochs, (epoch + 1) * state.steps
            if bad := self.loader.report_bad(self.log.note):
                self.log.record(end, {"train/bad_images": bad})
            due = (epoch + 1) % policy.eval_freq == 0 or final
            if (epoch + 1) % policy.save_last_freq == 0 or due or final:
                self.save(final)
            if due:
                self.evaluate(end)
                if policy.patience and state.evaluations.since_best >= policy.patience and not final:
                    self.log.note(f"--patience {policy.patience}: {state.evaluations}; training ends")
                    self.save(final=True)  # if it was put off, see `save`
                    return

    def evaluate(self, step: int) -> None:
        """Measures the weights, and keeps them if they are the best so far.

        It draws from no global generator, so that a run does not depend on how often it is evaluated. The
        checkpoint is written before, so that a signal can end it at once. Its shapes are too many to compile.
        """
        state, scores = self.state, None
        if state.step == state.resumed_step:
            # The run was not trained since it was resumed: its log says whether it was evaluated.
            scores = dist.gather(self.log.find(step, "val/bits_per_dim"))[0]
        if scores is None:
            self.report(state.finish(self.output_dir), final=False)
            models = {"": self.model}
            if state.ema is not None:
                raw = {} if state.evaluations.caught_up else {"raw weights": self.model}
                models = {"averaged weights": state.ema.module, **raw}
            with self.interrupt.immediately(), torch.compiler.set_stance("force_eager"):
                measured = self.measure(state.whole(models), step, self.log)
                scores = {f"val/{name}": value for name, value in measured.items()}
                self.log.record(step, scores)
        bits, raw_bits = scores["val/bits_per_dim"], scores.get("val/raw_bits_per_dim")
        if state.evaluations.note(step, bits, raw_bits):
            self.report(state.save_best(self.output_dir, self.flags), final=False)

    def after_step(self, epoch: int, images: int) -> None:
        """Saves when it is time to, and stops all processes after the same step when one was told to."""
        state, every = self.state, self.policy.save_every_steps
        state.step, state.place = state.step + 1, (epoch, images)
        signum = self.interrupt.agreed()
        if signum or self.save_is_due or (every and state.step % every == 0):
            self.save(final=bool(signum))
        if signum:
            raise Interrupted(self.interrupt.name(signum))

    def save(self, final: bool) -> None:
        """Writes a checkpoint, or if the last step was bad and it is not `final`, after the next good step.

        If it cannot be written, training ends if it is `final` or `on_save_error` says so. Raises Diverged
        where a checkpoint would not be worth keeping.
        """
        state, policy = self.state, self.policy
        state.watch.read()
        self.recipe.check(state.watch, state.steps, ended=final)
        self.save_is_due = not final and state.watch.is_bad
        if not self.save_is_due:
            self.report(state.save(self.output_dir, policy.keep_last, self.flags, final), final)

    def report(self, error: str | None, final: bool) -> None:
        """Ends training where a checkpoint could not be written, or only says so (see SavePolicy)."""
        if error and (final or self.policy.on_save_error == "stop"):
            raise UserError(error)
        if error:
            self.log.say(f"{error}; training goes on (--on_save_error continue)")
