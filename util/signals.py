"""Being told to stop: SIGTERM (a scheduler, torchrun), SIGUSR1 (Slurm's warning), Ctrl-C."""

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
IMPATIENT = 2.0  # seconds; a Ctrl-C later than this after another means at once (torchrun passes each on, doubling it)


class Interrupted(BaseException):
    """Raised where a run ends because it was told to. Nobody's `except Exception` shall take it for a bad image."""


class Interrupt:
    """Notes the signals within its block, so that all processes can stop after the same step.

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
        if (
            threading.current_thread() is threading.main_thread()
        ):  # elsewhere Python lets nobody handle signals
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is None:
            self.agreement.close()

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.signal and now - self.since > IMPATIENT:
            raise KeyboardInterrupt
        self.signal, self.since = self.signal or number, self.since or now
        if self.at_once:
            raise Interrupted(self.name(number))

    def agreed(self) -> int:
        """The signal that any process had before its last call, the same for all at each call; 0 for none."""
        return self.agreement.most(self.signal)

    @contextmanager
    def immediately(self) -> Iterator[None]:
        """Inside, a signal raises Interrupted at once, as does what fails because another process had one."""
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


@atexit.register  # after multiprocessing.util has been imported, so that it runs before that one's end
def end_workers() -> None:
    """What multiprocessing does with daemons as a process ends, but by SIGKILL: they ignore the SIGTERM it would wait for."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def ignore_in_worker(_: int = 0) -> None:
    """For data workers: a signal to the whole process group is the training process's to handle, and to end them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
