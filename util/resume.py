"""Saving the state of a run, and continuing from it."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from util import checkpoint, dist
from util.dist import World
from util.errors import UserError, reading

SETTINGS = "settings.json"


def began_here(folder: Path) -> bool:
    """Whether the run in `folder` was begun by this very job, before torchrun restarted its processes."""
    try:
        return json.loads((folder / SETTINGS).read_text())["job"] == dist.job()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def find_origin(resume: str, folder: Path) -> Path | None:
    """The checkpoint from which a run in `folder` continues: `resume`'s, or after a restart its own.

    None where there is none yet. Raises UserError where the folder holds checkpoints of another run.
    """
    own, path = folder / checkpoint.NAME, checkpoint.locate(resume) if resume else None
    found = checkpoint.candidates(own)
    if dist.restarts() and found and began_here(folder):
        newest = max(file.stat().st_mtime_ns for file in found)
        if newest >= (folder / SETTINGS).stat().st_mtime_ns:  # written since the run began
            return own
    same_folder = path is not None and path.parent.resolve() == folder.resolve()
    if found and not same_folder:
        raise UserError(
            f"--output_dir {folder} holds the checkpoints of another run; give --resume {folder} to go on "
            "with it, or another --output_dir"
        )
    return None if same_folder and path.name == own.name and not found else path


def random_state(device: torch.device) -> dict:
    """The states of all random number generators of this process, as tensors and plain values only."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if hasattr(module := torch.get_device_module(device), "get_rng_state"):
        state["device"] = module.get_rng_state(device)
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    """Sets all random number generators of this process to a state that `random_state` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    module = torch.get_device_module(device)
    if "device" in state and hasattr(module, "set_rng_state"):
        module.set_rng_state(state["device"], device)


class RunState:
    """What a run keeps in its checkpoints, and where it is.

    step, place   so many optimiser steps are done, and: the number of an epoch, and how many of its images
                  are done
    ema           the exponential moving average of the weights, where there is an `ema_decay`, or None
    half          whether autocast is float16, whose gradients need to be scaled
    steps         in an epoch; images: in a step of all processes together
    bits          what, besides weights and random numbers, the bits of the run depend on, by name
    saved_step    the step of the last checkpoint; resumed_step: that at which the run was resumed, or None
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, world: World, *, half: bool,
        ema_decay: float | None, start_epoch: int, steps: int, images: int, bits: dict,
    ):  # fmt: skip
        self.model, self.optimizer, self.world, self.ema = model, optimizer, world, None
        if ema_decay is not None:
            from timm.utils import ModelEmaV3

            self.ema = ModelEmaV3(model, decay=ema_decay)
        self.device, self.steps, self.images = next(model.parameters()).device, steps, images
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.bits = {"processes": world.size, "threads": torch.get_num_threads(), **bits}
        self.step, self.place = start_epoch * steps, (start_epoch, 0)
        self.saved_step = self.resumed_step = None

    def save(self, folder: Path, keep_last: int, flags) -> str | None:
        """Writes a checkpoint of now, unless there is one. Returns, on every process, what went wrong, or
        None.
        """
        if self.step == self.saved_step:
            return None
        (epoch, done), error = self.place, None
        states = dist.gather(random_state(self.device))
        if self.world.is_main:
            finished = -(-done // self.images) >= self.steps
            content = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "epoch": epoch if finished else epoch - 1,
                "scaler": self.scaler.state_dict(),
                "args": flags,
                "step": self.step,
                "place": self.place,
                "random": states,
                "run": self.bits,
            }
            if self.ema is not None:
                content["model_ema"] = self.ema.module.state_dict()
            try:
                checkpoint.save(folder, content, keep_last)
            except OSError as failed:
                reason = failed.strerror or failed
                error = f"{folder}: the checkpoint of step {self.step} could not be written ({reason})"
        error = dist.gather(error)[0]
        self.saved_step = self.step if error is None else self.saved_step
        return error

    def load(self, path: Path, folder: Path, say: Callable[[str], None]) -> None:
        """Continues from the newest complete checkpoint at `path`, for a run in `folder`."""
        chosen = []
        path = dist.on_main(
            self.world, lambda: chosen.append(checkpoint.load_newest(path, say)) or chosen[0][0]
        )
        path, content = chosen[0] if chosen else (path, checkpoint.load(path))
        checkpoint.load_weights(self.model, content["model"], path)
        if self.ema is not None:
            checkpoint.load_weights(self.ema.module, content.get("model_ema") or content["model"], path)
        if not {"optimizer", "epoch"} <= content.keys():
            say(f"{path} holds weights only: starting from them at epoch {self.place[0]}")
            return
        with reading(path, "its optimizer or random state is not of such a run"):
            changes = self._restore(content)
        if changes:
            say(f"{path} was written with {'; '.join(changes)}: not bit for bit the run that was not stopped")
        self.resumed_step = self.step
        if path.parent.resolve() == folder.resolve():
            self.saved_step = self.step
        if content.get("model_ema") and self.ema is None:
            say(f"{path} holds an average, which ends here: without --ema none is kept")
        say(f"resumed {path} at step {self.step}: epoch {self.place[0]}, {self.place[1]} of its images done")

    def _restore(self, content: dict) -> list[str]:
        """Restores all but the weights. Returns what makes the run differ from one that was not stopped."""
        saved = content["optimizer"]
        for group, ours in zip(saved["param_groups"], self.optimizer.param_groups, strict=False):
            # A published file knows nothing of the fused kernel, and the flag decides on the weight decay.
            group.update(fused=True, foreach=None, weight_decay=ours["weight_decay"])
        self.optimizer.load_state_dict(saved)
        if content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        epoch, images = content.get("place", (content["epoch"] + 1, 0))
        self.place = int(epoch), int(images)
        self.step = int(content.get("step", self.place[0] * self.steps))
        states = content.get("random", [])
        before = {**self.bits, "processes": len(states), **content.get("run", {})}
        if len(states) == self.world.size:
            set_random_state(states[self.world.rank], self.device)
        return [f"{name} {before[name]}, now {now}" for name, now in self.bits.items() if before[name] != now]
