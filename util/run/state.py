"""The state of a run: saving it, and continuing from it."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import nn

from util import checkpoint, dist
from util.dist import World
from util.errors import reading
from util.files import write_json
from util.flags import provenance
from util.run.evaluations import Evaluations
from util.run.folder import SETTINGS, began_here, check_room, clean, find_origin, load_newest
from util.run.random import random_state, set_random_state
from util.run.watch import LossWatch


class RunState:
    """What a run keeps in its checkpoints, and where it is.

    step, place   so many optimiser steps are done, and: the number of an epoch, and how many of its images
                  are done
    ema           the exponential moving average of the weights, where there is an `ema_decay`, or None
    half          whether autocast is float16, whose gradients need to be scaled
    sharded       the `Sharded` of a sharded model, which writes checkpoints while training goes on, or None
    steps         in an epoch; images: in a step of all processes together
    bits          what, besides weights and random numbers, the bits of the run depend on, by name
    saved_step    the step of the last checkpoint; resumed_step: that at which the run was resumed, or None
    evaluations   what the evaluations of the run have shown so far
    watch         judges the losses; healthy: the newest checkpoint of the run that they show to be healthy
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, world: World, *, half: bool,
        ema_decay: float | None, start_epoch: int, steps: int, images: int, bits: dict, sharded=None,
    ):  # fmt: skip
        self.model, self.optimizer, self.world = model, optimizer, world
        self.ema, self.sharded = None, sharded
        if sharded is not None:
            optimizer.register_step_pre_hook(sharded.wait_for_copy)
        if ema_decay is not None:
            from timm.utils import ModelEmaV3

            # In step n the decay is min(ema_decay, (n - 1) / (n + 8)): the random weights at the start are
            # forgotten at once, and until ema_decay is reached the mean age of the weights is n / 10 steps.
            copied = model if sharded is None else sharded.plain
            self.ema = ModelEmaV3(copied, ema_decay, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)
        self.device, self.steps, self.images = next(model.parameters()).device, steps, images
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        here = {"threads": torch.get_num_threads(), "shard": sharded is not None}
        self.bits = {"processes": world.size, **here, **bits}
        self.step, self.place = start_epoch * steps, (start_epoch, 0)
        self.saved_step = self.resumed_step = self.healthy = None
        self.watch, self.evaluations = LossWatch(), Evaluations()

    def begin(self, resume: str, folder: Path | None, flags, say: Callable[[str], None]) -> None:
        """Begins a run in `folder`, from the checkpoint `resume`, or from its own (see `find_origin`).

        Records `flags` in settings.json. Calls `say` with lines for the log.
        """
        origin = dist.on_main(self.world, lambda: find_origin(resume, folder))
        if origin is not None:
            self.load(origin, folder, say)
        elif resume:
            say(f"{resume} holds no {checkpoint.NAME} yet: starting afresh")
        dist.barrier()  # all have read what the first is about to tidy up and to write
        if self.world.is_main and folder is not None:
            self._tidy_up(folder, say)
            if not (dist.restarts() and began_here(folder)):
                write_json(folder / SETTINGS, {**provenance(flags), "job": dist.job()})

    def whole(self, models: dict[str, nn.Module]) -> Iterable[tuple[str, nn.Module]]:
        """The names and models, for an evaluation; each sharded one has all weights in its turn."""
        return models.items() if self.sharded is None else self.sharded.whole(models)

    def _tidy_up(self, folder: Path, say: Callable[[str], None]) -> None:
        """Tidies up the folder of the run. Says a line if it has no room for two checkpoints."""
        clean(folder)
        own = checkpoint.numbered(folder, self.step)
        if self.saved_step is not None and own.exists():  # the run may have gone back to an older one
            with suppress(OSError):  # a full disk without links
                checkpoint.make_last(own)
        check_room(folder, self._size(), say)

    def _size(self) -> int:
        """The bytes of a checkpoint, about."""
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return weights * (3 if self.ema is None else 4)  # with the optimiser's two moments

    def confirm(self, folder: Path) -> None:
        """Notes that the last checkpoint is healthy, if the first loss computed from it is good."""
        if self.saved_step is not None and self.watch.followed:
            path = checkpoint.numbered(folder, self.saved_step)
            self.healthy = path if path.exists() else self.healthy

    def finish(self, folder: Path | None) -> str | None:
        """Waits until the last checkpoint of a sharded model is written. Returns as `save` does.

        Where the disk was full, an old checkpoint makes room for the next one; `made_room` says so.
        """
        self.made_room = False
        if self.sharded is None or (failed := self.sharded.wait()) is None:
            return None
        path, self.saved_step = checkpoint.numbered(folder, self.saved_step), None
        self.made_room = dist.on_main(self.world, lambda: checkpoint.clean_up(path, failed, self.healthy))
        return checkpoint.failure(path, failed)

    def save(self, folder: Path | None, keep_last: int, flags, final: bool = True) -> str | None:
        """Writes a checkpoint of now, unless there is one; that of a sharded model while training goes on,
        if it is not `final`. Returns, on every process, what went wrong, or None.
        """
        error = self.finish(folder)
        if folder is None or self.step == self.saved_step:
            return error
        self.confirm(folder)
        content = self._content(flags)
        commit = partial(checkpoint.save, folder, keep_last=keep_last, healthy=self.healthy)
        path = checkpoint.numbered(folder, self.step)
        if self.sharded is not None:
            if self.world.is_main:
                checkpoint.make_way(path, self._size(), self.healthy)
            parts, again = checkpoint.shards_of(path), True
            while again:
                self.sharded.start(content, parts, commit)
                self.saved_step, self.watch.followed = self.step, None
                error = self.finish(folder) if final else error
                again = final and self.made_room
            return error
        if self.world.is_main:
            try:
                commit(content)
            except OSError as failed:
                error = checkpoint.failure(path, failed)
        error = dist.gather(error)[0]
        if error is None:
            self.saved_step, self.watch.followed = self.step, None
        return error

    def _content(self, flags) -> dict:
        (epoch, done), average = self.place, {}
        finished = -(-done // self.images) >= self.steps
        if self.ema is not None:
            average = {"model_ema": self.ema.module.state_dict()}
        return {
            "model": self.model.state_dict(),
            **average,
            "optimizer": self.optimizer.state_dict(),
            "epoch": epoch if finished else epoch - 1,
            "scaler": self.scaler.state_dict(),
            "args": flags,
            "step": self.step,
            "place": self.place,
            "random": dist.gather(random_state(self.device)),
            "run": self.bits,
            "losses": list(self.watch.losses),
            "evaluations": asdict(self.evaluations),
        }

    def save_best(self, folder: Path | None, flags) -> str | None:
        """Writes the weights, averaged where there is an average, as the best ones of the run.

        Returns, on every process, what went wrong, or None.
        """
        error, source = None, self.model if self.ema is None else self.ema.module
        weights = source.state_dict() if self.sharded is None else self.sharded.full_weights(source, True)
        if self.world.is_main and folder is not None:
            content = {
                "model": weights,
                "args": flags,
                "step": self.step,
                "bits_per_dim": self.evaluations.best,
            }
            if self.ema is not None:
                content["model_ema"] = weights  # the same, for --ema; the file holds them once
            try:
                checkpoint.save_best(folder, content)
            except OSError as failed:
                error = f"{folder / checkpoint.BEST} could not be written ({failed.strerror or failed})"
        return dist.gather(error)[0]

    def go_back(self, folder: Path | None) -> str:
        """Lets the run continue from its newest healthy checkpoint. Returns the advice to do so."""
        if folder is None:
            return "start anew with a lower --lr or --blr, or --amp off"
        self.finish(folder)
        self.confirm(folder)
        if self.healthy is None:
            return f"no checkpoint in {folder} is known to be healthy: start anew with a lower --lr or --blr"
        with suppress(OSError):  # a full disk without links
            checkpoint.make_last(self.healthy)
        return (
            f"the last healthy checkpoint is {self.healthy}: --resume it with a lower --lr or --blr, "
            "or with --amp off"
        )

    def load(self, path: Path, folder: Path | None, say: Callable[[str], None]) -> None:
        """Continues from the newest complete checkpoint at `path`, for a run in `folder`."""
        chosen, load = [], checkpoint.load
        if self.sharded is not None:
            load = partial(checkpoint.load, mmap=True, like=self.sharded.like(self.model, self.optimizer))
        path = dist.on_main(self.world, lambda: chosen.append(load_newest(path, say, load)) or chosen[0][0])
        path, content = chosen[0] if chosen else (path, load(path))
        checkpoint.load_weights(self.model, content["model"], path)
        if self.ema is not None:
            checkpoint.load_weights(self.ema.module, content.get("model_ema") or content["model"], path)
        if not {"optimizer", "epoch"} <= content.keys():
            say(f"{path} holds weights only: starting from them at epoch {self.place[0]}")
            return
        with reading(path, "its optimizer or random state is not of such a run"):
            changes = self._restore(content)
            losses = [float(loss) for loss in content.get("losses", ())]
            evaluations = Evaluations.restored(content.get("evaluations", {}))
        if changes:
            say(f"{path} was written with {'; '.join(changes)}: not bit for bit the run that was not stopped")
        self.resumed_step = self.step
        if folder is not None and path.parent.resolve() == folder.resolve():
            own, known = checkpoint.numbered(folder, self.step), checkpoint.find_healthy(folder)
            # What comes before a healthy one is healthy too.
            self.healthy = own if known and known.name > own.name and own.exists() else known
            self.saved_step = self.step
            self.watch.losses.extend(losses)
            self.evaluations = evaluations
        if content.get("model_ema") and self.ema is None:
            say(f"{path} holds an average, which ends here: without --ema none is kept")
        say(f"resumed {path} at step {self.step}: epoch {self.place[0]}, {self.place[1]} of its images done")

    def _restore(self, content: dict) -> list[str]:
        """Restores all but the weights. Returns what makes the run differ from one that was not stopped."""
        saved = content["optimizer"]
        for group, ours in zip(saved["param_groups"], self.optimizer.param_groups, strict=False):
            # A published file knows nothing of the fused kernel, and the flag decides on the weight decay.
            group.update({name: ours[name] for name in ("fused", "foreach", "weight_decay") if name in ours})
        self.optimizer.load_state_dict(saved)
        if content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        epoch, images = content.get("place", (content["epoch"] + 1, 0))
        self.place = int(epoch), int(images)
        self.step = int(content.get("step", self.place[0] * self.steps))
        states = content.get("random", [])
        before = {**self.bits, "shard": False, "processes": len(states), **content.get("run", {})}
        if len(states) == self.world.size:
            set_random_state(states[self.world.rank], self.device)
        return [f"{name} {before[name]}, now {now}" for name, now in self.bits.items() if before[name] != now]
