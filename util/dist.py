"""Processes: who am I, how many are we, and the few collective calls that we need. All of them work alone too."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from util.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def from_environment(on_itp: bool = False, world_size: int = 1, rank: int = -1) -> World:
    """The place that torchrun's environment variables (or, `on_itp`, Open MPI's) give this process.

    Without those: process `rank` of `world_size`, as the flags say; alone by default.
    """
    prefix = "OMPI_COMM_WORLD_" if on_itp else ""
    names = [prefix + name for name in ("RANK", "SIZE" if on_itp else "WORLD_SIZE", "LOCAL_RANK")]
    if all(name in os.environ for name in names):
        return World(*(int(os.environ[name]) for name in names))
    if on_itp or (world_size > 1 and not 0 <= rank < world_size):
        raise UserError(
            f"--dist_on_itp needs {', '.join(names)}; --world_size above 1 needs torchrun or --local_rank"
        )
    return World(max(rank, 0), world_size, max(rank, 0)) if world_size > 1 else World()


def pick_device(name: str | None, world: World) -> torch.device:
    """The device of that name, or else the accelerator that torch finds, else the CPU; each process has its own."""
    found = torch.accelerator.current_accelerator(check_available=True)
    name = name or (found or torch.get_default_device()).type
    try:
        device = torch.device(name)
        usable = device.type == "cpu" or (found is not None and found.type == device.type)
    except RuntimeError:
        usable = False
    if not usable:
        raise UserError(f"--device {name}: torch finds no such device here; leave it out or give cpu")
    if device.type == "cpu":
        return device
    index = world.local_rank if world.size > 1 or device.index is None else device.index
    if index >= (count := torch.accelerator.device_count()):
        raise UserError(f"--device {name}: number {index} of {count}; start at most one process a device")
    torch.accelerator.set_device_index(index)
    return torch.device(device.type, index)


def connect(world: World, device: torch.device, init_method: str = "env://") -> None:
    """Joins the process group, on the backend that suits the device. Nothing to do for a process alone."""
    if world.size > 1:
        backend = dist.get_default_backend_for_device(device)
        try:
            store, _, _ = next(dist.rendezvous(init_method, rank=world.rank, world_size=world.size))
            # torchrun's restarted workers meet the store of those that died, and what they wrote (pytorch issue 135712).
            store = dist.PrefixStore(f"restart {restarts()}", store)
            dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--dist_url {init_method}: {str(error).splitlines()[0]}") from error


def restarts() -> int:
    """How often torchrun has started this job's processes anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


class Agreement:
    """The largest of the processes' numbers, call by call, without waiting for a device or for what is still on its way."""

    def __init__(self):
        self.group, self.last = None, None
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo")  # on the host, and not in the way of the gradients

    def most(self, number: int) -> int:
        """The largest that was given in the call before; alone, `number`."""
        if self.group is None:
            return number
        given = torch.tensor([number])
        work = dist.all_reduce(given, dist.ReduceOp.MAX, group=self.group, async_op=True)
        found, self.last = self._finish(), (work, given)
        return found

    def close(self) -> None:
        self._finish()

    def _finish(self) -> int:
        if self.last is None:
            return 0
        work, given = self.last
        work.wait()
        return int(given)


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def mean(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    if not dist.is_initialized():
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def gather(value) -> list:
    """One picklable value of each process, in the order of ranks, on every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(world: World, function: Callable[[], T]) -> T:
    """What `function` returns on the first process, on all of them; or its UserError."""
    found = None
    if world.is_main:
        try:
            found = function()
        except UserError as error:
            found = error
    found = gather(found)[0]
    if isinstance(found, UserError):
        raise found
    return found


def job() -> dict[str, str | None]:
    """What this job's processes are known by, the same before and after torchrun's restart."""
    return {
        "run_id": os.environ.get("TORCHELASTIC_RUN_ID"),
        "parent": f"{socket.gethostname()}:{os.getppid()}",
    }


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
