"""Sharded runs by torch's own engine: FSDP2 divides a model among processes, DCP writes its checkpoints.

util/checkpoint/parts.py says what is in such a checkpoint.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import async_save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from util.checkpoint.parts import TREES, Writer, walk
from util.dist import host_group
from util.errors import UserError, one_line

warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # none is changed in place


class Saver:
    """Writes checkpoints while training goes on, one at a time. All processes must call it alike."""

    def __init__(self):
        self.on_gpu, self.group = torch.cuda.is_available(), host_group()  # for another thread
        self.stager = DefaultStager(StagingOptions(self.on_gpu, False, True, self.on_gpu))  # keeps its copy
        self.future = self.copied = None

    def wait_for_copy(self, *_) -> None:
        """Must be called before the tensors of the last checkpoint change."""
        copied, self.copied = self.copied, None
        if copied is not None and (error := copied.exception()) is not None:
            raise UserError(f"a checkpoint could not be copied to this host ({one_line(error)})") from error

    def start(self, content: dict, folder: Path, commit: Callable[[dict], None]) -> None:
        """Begins to copy and to write the tensors of a checkpoint, after the end of the one before.

        At the end the first process, in another thread, calls `commit` with what is left of the checkpoint.
        """
        tensors = {}

        def take(path: str, value):
            if isinstance(value, Tensor) and value.dim() and value.numel():
                tensors[path] = value
                return path
            return copy.deepcopy(value)  # such as AdamW's number of steps, which goes on

        rest = {**content, **walk({key: content[key] for key in TREES if key in content}, take)}
        writer = Writer(folder, lambda shards: commit({**rest, "shards": shards}))
        if self.on_gpu:
            torch.cuda.synchronize()  # the copy is made in a stream of its own
        saving = async_save(
            tensors, storage_writer=writer, process_group=self.group, async_stager=self.stager,
            no_dist=self.group is None,
        )  # fmt: skip
        self.copied, self.future = saving.staging_completion, saving.upload_completion

    def wait(self) -> BaseException | None:
        """Waits for the end of writing. Returns, on all processes, what failed on one of them, or None.

        Raises what the other processes do not hear of before this one ends.
        """
        self.wait_for_copy()
        future, self.future = self.future, None
        error = future.exception() if future is not None else None
        if error is None or isinstance(error, CheckpointException):
            return error and next(iter(error.failures.values()))[0]
        raise error


class Sharded(Saver):
    """A model whose weights, which all processes have alike on the host, are divided among their devices.

    The weights of one unit at a time are gathered, in `dtype` (None: their own), and freed after their pass.
    A unit is a transformer block, the rest of a level or head (a module with `blocks`), or the rest of the
    model. Gradients are summed in float32. There must be several processes.

    plain  a copy of the model as it was, whose weights are the divided ones
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, device: torch.device):
        super().__init__()
        size, self.plain = torch.distributed.get_world_size(), copy.deepcopy(model)

        def evenly(weight: Tensor) -> Shard | None:
            """Divides along the first axis that gives equal parts; that of positions has length 1."""
            axes = [axis for axis, length in enumerate(weight.shape) if length % size == 0]
            return Shard(axes[0]) if axes else None

        how = {
            "mesh": init_device_mesh(device.type, (size,)),
            "shard_placement_fn": evenly,
            # Inputs keep their dtype, or pixels would be rounded to other values.
            "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
            "ignored_params": {p for p in model.parameters() if p.numel() == 0},  # without classes
        }
        for level in reversed(list(model.modules())):  # the deeper ones first
            for unit in (*level.blocks, level) if hasattr(level, "blocks") else ():
                fully_shard(unit, **how)
        fully_shard(model, **how)
        self.plain.load_state_dict(model.state_dict(), assign=True)
        self.plain.to(device)

    def full_weights(self, model: nn.Module, on_main: bool = False) -> dict[str, Tensor]:
        """All weights of a divided model, on each process or, on the host, `on_main`. All must call it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=on_main)
        return get_model_state_dict(model, options=options)

    def like(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[str], Tensor | None]:
        """For `parts.fill`: gives the weight that is divided like the tensor at a path of a checkpoint."""
        found = {f"{key}/{name}": x for key in TREES[:2] for name, x in model.state_dict().items()}
        params = [p for group in optimizer.param_groups for p in group["params"]]
        moments = ("exp_avg", "exp_avg_sq")
        return (found | {f"optimizer/state/{i}/{x}": p for i, p in enumerate(params) for x in moments}).get

    def whole(self, models: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
        """Yields the names of divided models, and `plain` with all weights of each. All must call it."""
        for name, model in models.items():
            self.plain.load_state_dict(self.full_weights(model), assign=True)
            yield name, self.plain
            self.plain.load_state_dict(model.state_dict(), assign=True)
