"""Watching work from outside: what its callback is told, as an iterator."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress


class Stopped(Exception):
    """Raised in a callback whose watcher has gone."""


def watch(work: Callable[[Callable], object]) -> Iterator[tuple]:
    """Runs `work(callback)` in a thread; yields ("step", arguments of a callback), …, and ("result", what it returned).

    What `work` raises is raised here. Where the iterator is closed, the work ends at its next callback.
    """
    told: queue.SimpleQueue = queue.SimpleQueue()
    stop = threading.Event()

    def callback(*arguments) -> None:
        if stop.is_set():
            raise Stopped
        told.put(("step", arguments))

    def run() -> None:
        try:
            told.put(("result", work(callback)))
        except BaseException as error:
            told.put(("error", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (event := told.get())[0] == "step":
            yield event
        if event[0] == "error":
            raise event[1]
        yield event
    finally:
        stop.set()
        with suppress(RuntimeError):
            thread.join()
