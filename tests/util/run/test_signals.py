import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from conftest import ROOT
from util.run.signals import SIGNALS, Interrupt, Interrupted, ignore_in_worker


def send(number) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_afterwards_handled_as_before(number):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert interrupt.agreed() == 0
        send(number)
        assert interrupt.agreed() == number
        assert interrupt.name(number).startswith("SIG")
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_means_now_but_one_that_torchrun_doubles_does_not(monkeypatch):
    with Interrupt() as interrupt:
        send(signal.SIGINT)
        send(signal.SIGINT)
        now = time.monotonic()
        monkeypatch.setattr("time.monotonic", lambda: now + 3)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert interrupt.agreed() == signal.SIGINT


def test_an_evaluation_ends_at_once():
    with Interrupt() as interrupt:
        with pytest.raises(Interrupted, match="SIGTERM"), interrupt.immediately():
            send(signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM"), interrupt.immediately():
            raise AssertionError("not reached: it was told before")
    with Interrupt() as interrupt, pytest.raises(Interrupted), interrupt.immediately(), suppress(Exception):
        send(signal.SIGTERM)  # as in code that takes any Exception for a bad image
    with Interrupt() as interrupt, pytest.raises(ZeroDivisionError), interrupt.immediately():
        _ = 1 / 0


def test_workers_ignore_what_the_training_process_handles():
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        ignore_in_worker()
        for number in SIGNALS:
            send(number)
        assert all(signal.getsignal(number) is signal.SIG_IGN for number in SIGNALS)
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


LEFT = (
    "import torch; from util.dist import World; from util.run.signals import ignore_in_worker\n"
    "loader = torch.utils.data.DataLoader(range(9), num_workers=1, worker_init_fn=ignore_in_worker, persistent_workers=True)\n"
    "batches = iter(loader); next(batches); keep = [batches]; keep.append(keep)\n"
    "import sys; sys.modules['kept'] = keep; raise SystemExit(2)"
)


def test_a_process_that_ends_with_workers_left_does_end():
    ended = subprocess.run([sys.executable, "-c", LEFT], cwd=ROOT, timeout=60, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (2, b"")
