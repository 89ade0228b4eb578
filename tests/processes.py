"""Runs main_fractalgen.py in processes that are forked from one that has imported all modules.

This saves the ten seconds that the imports of each process would take.
"""

import ctypes
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.distributed import run

import main_fractalgen

forkserver = multiprocessing.get_context("forkserver")
# The preloaded modules include those that training imports when it begins. Nothing is computed before the
# fork, so there are no threads yet that a fork would lose.
forkserver.set_forkserver_preload(
    ["main_fractalgen", "util.run.sharding", "torch._dynamo", "torch.utils.tensorboard", "timm.utils"]
)


class Started:
    """A run of main_fractalgen.py with `flags`. It has methods like those of Popen.

    processes      number of processes, which form one group
    torchrun       flags of torchrun; unless None, only torchrun is started here, and it forks the processes
    network        file of the network namespace to run in, see hosts.py
    max_file_size  limit of the size of files in bytes, to simulate a full disk
    """

    def __init__(
        self,
        flags: list[str],
        processes: int = 1,
        torchrun: str | None = None,
        max_file_size: int | None = None,
        network: Path | None = None,
    ):
        self.folder = tempfile.TemporaryDirectory(prefix="started")
        self.said, rendezvous = Path(self.folder.name) / "said", f"file://{self.folder.name}/store"
        commands = [flags]
        if torchrun is not None:
            place = "" if "--nnodes" in torchrun else "--standalone"
            forked = f"{place} --nproc_per_node={processes} --run_path --start_method=fork {torchrun}"
            commands = [[*forked.split(), main_fractalgen.__file__, *flags]]
        elif processes > 1:
            place = ["--dist_url", rendezvous, f"--world_size={processes}"]
            commands = [[*flags, *place, f"--local_rank={rank}"] for rank in range(processes)]
        self.processes = [
            forkserver.Process(
                target=_run,
                args=(command, torchrun is not None, self.said, max_file_size, network),
                daemon=torchrun is None,
            )
            for command in commands
        ]
        for process in self.processes:
            process.start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def poll(self) -> int | None:
        """Returns None while a process runs, then the first exit status that is not 0, or 0."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next(filter(None, codes), 0)

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        """Waits for the end. Returns what all processes wrote to standard output and error."""
        give_up = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, give_up - time.monotonic()))
        self.returncode = self.poll()
        for process in self.processes:
            process.kill()
        return self.said.read_text() if self.said.exists() else "", None


def _run(
    command: list[str], torchrun: bool, said: Path, max_file_size: int | None, network: Path | None
) -> None:
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    if network is not None:
        with open(network) as namespace:
            ctypes.CDLL(None).setns(namespace.fileno(), 0)
        # The name of this machine stands for another address, and a host may come back (docs/training.md).
        os.environ |= {"GLOO_SOCKET_IFNAME": "eth0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if max_file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    torch.set_num_threads(1)  # torchrun does the same, and the bits of the results depend on it
    if torchrun:
        run.main(command)
    else:
        sys.argv = [main_fractalgen.__file__, *command]
        main_fractalgen.main()
