"""Hosts that are network namespaces of this machine, joined by a switch in another; nothing leaves the machine.

Needs Linux, root and the command `ip`, for limits of bandwidth also `tc` (package iproute2).
"""

import os
import signal
import subprocess
from pathlib import Path

from processes import Started

PORT = 29400


def run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True, text=True)


def what_is_missing() -> str | None:
    """Says why there can be no such hosts here, or None if there can."""
    try:
        with Hosts(1) as hosts:
            hosts.limit(0, 1000)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces: {getattr(error, 'stderr', None) or error}".strip()
    return None


class Hosts:
    """`count` hosts with the addresses 10.77.0.1, …; a context that removes them, and kills their processes."""

    def __init__(self, count: int):
        self.names = [f"fg{os.getpid()}-{number}" for number in range(count)]
        self.switch = f"fg{os.getpid()}-s"
        self.started: list[Started | None] = [None] * count

    def __enter__(self) -> "Hosts":
        try:
            run(f"ip netns add {self.switch}")
            run(f"ip -n {self.switch} link add br0 up type bridge")
            for number, name in enumerate(self.names):
                run(f"ip netns add {name}")
                run(f"ip -n {name} link add eth0 type veth peer name port{number} netns {self.switch}")
                run(f"ip -n {self.switch} link set port{number} up master br0")
                run(f"ip -n {name} addr add 10.77.0.{number + 1}/24 dev eth0")
                run(f"ip -n {name} link set eth0 up")
                run(f"ip -n {name} link set lo up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for number in range(len(self.names)):
            self.kill(number)
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def limit(self, number: int, mbit: float) -> None:
        """Limits what a host sends, in Mbit/s."""
        shape = f"tbf rate {mbit}mbit burst 64kb limit 64mb"  # so long a queue loses nothing
        run(f"tc -n {self.names[number]} qdisc replace dev eth0 root {shape}")

    def cut(self, number: int) -> None:
        """Cuts a host off, as a broken cable does: messages get lost, and nobody is told."""
        run(f"ip -n {self.switch} link set port{number} nomaster")

    def start(self, number: int, flags: list[str], *, torchrun: str = "", processes: int = 1) -> Started:
        """Starts torchrun on a host, which starts main_fractalgen.py with `flags`."""
        meet = (
            f"--nnodes={len(self.names)} --rdzv_backend=c10d --rdzv_endpoint=10.77.0.1:{PORT} --rdzv_id=hosts"
        )
        place = f"--local_addr=10.77.0.{number + 1} --rdzv_conf=is_host={int(number == 0)},join_timeout=60"
        network = Path("/run/netns") / self.names[number]
        self.started[number] = Started(
            flags, processes, torchrun=f"{meet} {place} {torchrun}", network=network
        )
        return self.started[number]

    def pids(self, number: int) -> list[int]:
        """All processes of a host."""
        found = subprocess.run(["ip", "netns", "pids", self.names[number]], capture_output=True, text=True)
        return list(map(int, found.stdout.split()))

    def kill(self, number: int) -> None:
        """Ends all processes of a host at once, as when its power fails."""
        for pid in self.pids(number):
            os.kill(pid, signal.SIGKILL)
