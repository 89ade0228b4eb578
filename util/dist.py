"""The processes of a run: which one this is, and collective calls, which work in a single process too."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from util.errors import UserError, one_line, reading

patience = timedelta(minutes=30)  # how long a process waits for another; `connect` sets it


@dataclass(frozen=True)
class World:
    """This process's number among all `size` processes, and among those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def from_environment(on_itp: bool = False, world_size: int = 1, rank: int = -1) -> World:
    """Reads this process's place from the environment variables of torchrun or, with `on_itp`, of Open MPI.

    Without those variables this is process `rank` of `world_size`, as the flags say. Raises UserError if the
    variables or the rank are missing.
    """
    prefix = "OMPI_COMM_WORLD_" if on_itp else ""
    names = [prefix + name for name in ("RANK", "SIZE" if on_itp else "WORLD_SIZE", "LOCAL_RANK")]
    if all(name in os.environ for name in names):
        return World(*(int(os.environ[name]) for name in names))
    if not on_itp and world_size <= 1:
        return World()
    if on_itp or not 0 <= rank < world_size:
        raise UserError(
            f"--dist_on_itp needs {', '.join(names)}; --world_size above 1 needs torchrun or --local_rank"
        )
    return World(rank, world_size, rank)


def pick_device(name: str | None, world: World) -> torch.device:
    """Returns the device `name`, or by default the accelerator that torch finds, or else the CPU.

    Each process gets a device of its own. Raises UserError if there is no such device.
    """
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


def connect(world: World, device: torch.device, init_method: str = "env://", seconds: float = 1800.0) -> None:
    """Joins the process group, with the backend that suits the device. A single process needs no group.

    After so many `seconds` a process gives up waiting for another.
    """
    global patience
    if world.size > 1:
        patience = timedelta(seconds=seconds)
        backend = dist.get_default_backend_for_device(device)
        with reading(f"--dist_url {init_method}", "the processes cannot meet"):
            store, _, _ = next(dist.rendezvous(init_method, rank=world.rank, world_size=world.size))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # torchrun's own store still has what workers wrote before a restart (pytorch issue 135712).
                # Each host counts its own restarts: one that comes back needs a new store (docs/training.md).
                store = dist.PrefixStore(f"restart {restarts()}", store)
            dist.init_process_group(
                backend, store=store, rank=world.rank, world_size=world.size, timeout=patience
            )


def host_group() -> dist.ProcessGroup | None:
    """A new group of all processes whose messages stay on the hosts; None in a single process."""
    return dist.new_group(backend="gloo", timeout=patience) if dist.is_initialized() else None


@contextmanager
def explaining_silence() -> Iterator[None]:
    """Turns the errors of a process that lost another into a UserError that says where it was."""
    try:
        yield
    except RuntimeError as error:
        said_by_gloo = "gloo/transport", "gloo/rendezvous", "pair closure"  # its errors have no type
        of_gloo = any(words in str(error) for words in said_by_gloo)
        if not (dist.is_initialized() and (of_gloo or isinstance(error, dist.DistError))):
            raise
        waited = "imed out" in str(error) or "imeout" in str(error)
        problem = (
            f"no answer from the others for {patience.total_seconds():g} s (--dist_timeout): a host is slow, "
            "stopped or cut off" if waited else "another process has ended"
        )  # fmt: skip
        place = f"process {dist.get_rank()} of {dist.get_world_size()} on {socket.gethostname()}"
        raise UserError(f"{place}: {problem} ({one_line(error)})") from error


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def restarts() -> int:
    """How often torchrun has restarted the processes of this job."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def job() -> dict[str, str | None]:
    """Identifies this job. The result is the same before and after a restart by torchrun."""
    return {
        "run_id": os.environ.get("TORCHELASTIC_RUN_ID"),
        "parent": f"{socket.gethostname()}:{os.getppid()}",
    }


class Agreement:
    """The maximum over all processes of a number, one call late, so that no process has to wait.

    It neither waits for the device nor for messages that are still on their way.
    """

    def __init__(self):
        self.group = host_group()  # its messages do not wait for those of the gradients
        self.work, self.number = None, torch.zeros(1, dtype=torch.int64)

    def largest(self, number: int) -> int:
        """The maximum of the previous call's numbers, 0 at the first call. A single process gets `number`."""
        if self.group is None:
            return number
        previous, self.number = self.close(), torch.tensor([number])
        self.work = dist.all_reduce(self.number, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return previous

    def close(self) -> int:
        """Waits for the last message. Returns the maximum."""
        if self.work is not None:
            self.work.wait()
        return int(self.number)


def mean(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    if not dist.is_initialized():
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def gather(value) -> list:
    """One picklable value of each process, ordered by rank, on every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(world: World, function: Callable[[], object]):
    """Calls `function` on the first process. All processes return its result, or raise its UserError."""
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


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
