"""Turns work that reports its steps to a callback into an iterator over these steps."""

import ctypes
import queue
import sys
import threading
from collections.abc import Callable, Iterator

# One thread does all work, one piece after the other: each thread that computes keeps memory of its own, and
# its own helper threads.
_jobs: queue.SimpleQueue = queue.SimpleQueue()


def _work_on_jobs() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    while True:
        _jobs.get()()
        if trim is not None:
            trim(0)  # glibc would keep what was freed, in more and more pieces


threading.Thread(target=_work_on_jobs, name="model", daemon=True).start()


class Stopped(Exception):
    """Raised inside a callback after the iterator over its steps was closed."""


def watch(work: Callable[[Callable], object]) -> Iterator[tuple]:
    """Runs `work(callback)` in the thread that all work shares, and yields its events.

    Yields ("step", arguments) for each call of the callback, and at last ("result", what `work` returned).
    An exception of `work` is raised here. If the iterator is closed early, the next call of the callback
    raises `Stopped`, which ends the work; if the work has not begun, it never does.
    """
    events: queue.SimpleQueue = queue.SimpleQueue()
    closed = threading.Event()

    def callback(*arguments) -> None:
        if closed.is_set():
            raise Stopped
        events.put(("step", arguments))

    def job() -> None:
        if closed.is_set():
            return
        try:
            events.put(("result", work(callback)))
        except Stopped:
            pass  # an exception that is kept would keep everything that the work had in memory
        except BaseException as error:
            events.put(("error", error))

    _jobs.put(job)
    try:
        while (event := events.get())[0] == "step":
            yield event
        if event[0] == "error":
            raise event[1]
        yield event
    finally:
        closed.set()
        event = None  # an exception would otherwise be in a cycle with this frame
