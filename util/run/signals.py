"""Signals that ask a run to stop: SIGTERM (a scheduler, torchrun), SIGUSR1 (Slurm's warning) and Ctrl-C."""

import atexit
import multiprocessing
import multiprocessing.util
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from util import dist

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
# Seconds. A second Ctrl-C that comes later than this ends the run at once. One that comes earlier is the same
# Ctrl-C, which torchrun passes on to its processes although they got it too.
DOUBLED = 2.0


class Interrupted(BaseException):
    """Ends a run that was asked to stop. It is no Exception, so nothing takes it for a bad image's error."""


class Interrupt:
    """Notes signals within its block, so that all processes can stop after the same step.

    with Interrupt() as interrupt:
        for ...:
            step()
            if signum := interrupt.agreed(): save and leave
    """

    def __init__(self):
        self.signal, self.since, self.at_once = 0, 0.0, False
        self.agreement = dist.Agreement()

    def __enter__(self) -> "Interrupt":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # Python forbids it in other threads
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is None:
            self.agreement.close()

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.signal and now - self.since > DOUBLED:
            raise KeyboardInterrupt
        self.signal, self.since = self.signal or number, self.since or now
        if self.at_once:
            raise Interrupted(self.name(number))

    def agreed(self) -> int:
        """A signal that some process had before its previous call, the same on all processes; 0 for none."""
        return self.agreement.largest(self.signal)

    @contextmanager
    def immediately(self) -> Iterator[None]:
        """Within this block a signal raises Interrupted at once.

        An error that comes after a signal becomes Interrupted too: it may be due to another process that has
        left.
        """
        if self.signal:
            raise Interrupted(self.name(self.signal))
        self.at_once = True
        try:
            yield
        except Exception as error:
            if self.signal:
                raise Interrupted(self.name(self.signal)) from error
            raise
        finally:
            self.at_once = False

    @staticmethod
    def name(number: int) -> str:
        return signal.Signals(number).name


@atexit.register  # multiprocessing.util is imported above, so that its own exit function runs after this one
def end_workers() -> None:
    """Kills data workers that are left when the process ends.

    multiprocessing would send them SIGTERM, which they ignore, and wait forever. torch would raise an error
    when they end, wherever the exit of the process then is.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def ignore_in_worker(_: int = 0) -> None:
    """Makes a data worker ignore the signals: its training process handles them and ends the workers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
