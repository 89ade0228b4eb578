"""How many threads a process computes with on a CPU, and how they wait for each other.

It is imported before torch, because the OpenMP library reads its environment variables when torch loads it.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Rounds of a thread that waits for the others, before it sleeps. OpenMP's own 300,000 last for milliseconds:
# where another process has taken a core, all threads then burn the time that the one they wait for needs.
SPIN = 2000
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
CGROUP = Path("/sys/fs/cgroup")


def bound_spinning() -> None:
    """Sets how long threads spin, unless torch is loaded already or the environment says it."""
    if "torch" not in sys.modules and not any(name in os.environ for name in SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN)


def usable_cores() -> float:
    """The number of cores that this process may use: its affinity, and the quota of its cgroup."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroups 2 and 1
        with suppress(OSError, ValueError):  # no such file, or no limit: "max 100000", or -1
            quota, period = map(int, " ".join((CGROUP / file).read_text() for file in files).split())
            cores = min(cores, quota / period) if quota > 0 else cores
    return cores


def _times() -> tuple[float, float, float]:
    """Seconds: the wall clock, and what all processes and this one have used of this process's cores."""
    used, own = 0.0, sum(os.times()[:4])
    with suppress(OSError, AttributeError):
        mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        for name, *ticks in map(str.split, Path("/proc/stat").read_text().splitlines()):
            if name in mine:
                user, nice, system, _idle, _wait, *interrupts = map(int, ticks[:8])
                used += (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), used, own


_STARTED = _times()


def busy_cores() -> float:
    """How many of the usable cores other processes have taken since this one was started; 0 if unknown."""
    secs, used, own = (now - then for now, then in zip(_times(), _STARTED, strict=True))
    return max(0.0, used - own) / max(secs, 0.1)


def cpu_name() -> str:
    """The name of this machine's processor, as torch knows it; "" where it does not."""
    import torch

    return getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")


@contextmanager
def num_threads(number: int) -> Iterator[None]:
    """Within this block torch computes with `number` threads on a CPU."""
    import torch

    if (before := torch.get_num_threads()) == number:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def limit_threads() -> str:
    """Lowers torch's number of threads to this process's share of the free cores. Returns that in words.

    The processes of a job on this machine share the cores. Nothing changes if OMP_NUM_THREADS is set.
    """
    import torch

    cores, busy = usable_cores(), busy_cores()
    if "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or 1)
        torch.set_num_threads(min(max(1, round((cores - busy) / local)), torch.get_num_threads()))
    spin = ", ".join(f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ)
    spin = f"; {spin}" if spin else ""
    return (
        f"CPU threads: {torch.get_num_threads()} of {cores:.3g} cores, of which others use {busy:.1f}{spin}"
    )
