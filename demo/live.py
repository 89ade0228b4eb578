"""Turns work that reports its steps to a callback into an iterator over these steps."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress


class Stopped(Exception):
    """Raised inside a callback after the iterator over its steps was closed."""


def watch(work: Callable[[Callable], object]) -> Iterator[tuple]:
    """Runs `work(callback)` in a thread and yields its events.

    Yields ("step", arguments) for each call of the callback, and at last ("result", what `work` returned).
    An exception of `work` is raised here. If the iterator is closed early, the next call of the callback
    raises `Stopped`, which ends the work.
    """
    events: queue.SimpleQueue = queue.SimpleQueue()
    closed = threading.Event()

    def callback(*arguments) -> None:
        if closed.is_set():
            raise Stopped
        events.put(("step", arguments))

    def run() -> None:
        try:
            events.put(("result", work(callback)))
        except BaseException as error:
            events.put(("error", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (event := events.get())[0] == "step":
            yield event
        if event[0] == "error":
            raise event[1]
        yield event
    finally:
        closed.set()
        with suppress(RuntimeError):
            thread.join()
