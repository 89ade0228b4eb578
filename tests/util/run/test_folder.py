import errno
import fcntl
import os
import signal
import socket
import threading
import time

import pytest
from processes import forkserver

from util.dist import World
from util.errors import UserError
from util.run.folder import sole_run


def hold(folder, environment: dict) -> None:
    """Holds the lock of the folder, and has a child, as a trainer has data workers."""
    os.environ.update(environment)
    with sole_run(folder, World(), print):
        child = os.fork()
        if child:
            (folder / "child.tmp").write_text(str(child))
            os.replace(folder / "child.tmp", folder / "child")
        time.sleep(60)
        os._exit(0)


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the lock of `tmp_path`, and ends it and its child at the end."""
    started = []

    def start(**environment):
        process = forkserver.Process(target=hold, args=(tmp_path, environment), daemon=True)
        process.start()
        started.append(process)
        while not (tmp_path / "child").exists():
            assert process.is_alive()
            time.sleep(0.01)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def enter(folder) -> list[str]:
    """Takes the lock and lets it go. Returns what was said."""
    said = []
    with sole_run(folder, World(), said.append):
        return said


def test_the_lock_names_its_holder_and_dies_with_it_though_its_children_live(tmp_path, holder):
    process = holder()
    with pytest.raises(
        UserError, match=f"{tmp_path}: process {process.pid} on {socket.gethostname()} is training"
    ):
        enter(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    os.kill(int((tmp_path / "child").read_text()), 0)  # still there
    assert enter(tmp_path) == enter(tmp_path) == []


def test_a_restart_by_torchrun_waits_for_the_process_before_it(tmp_path, holder, monkeypatch):
    process = holder(TORCHELASTIC_RUN_ID="ours")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "other")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="is training there"):
        enter(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "ours")
    monkeypatch.setattr("util.run.folder.TAKEOVER", 0.2)
    with pytest.raises(UserError, match="is training there"):
        enter(tmp_path)
    monkeypatch.setattr("util.run.folder.TAKEOVER", 60.0)
    threading.Timer(0.3, process.kill).start()
    assert enter(tmp_path) == []


def test_without_locks_a_line_is_said_and_the_run_goes_on(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    (line,) = enter(tmp_path)
    assert line.startswith(f"{tmp_path}: cannot be locked")


def test_a_lock_file_of_anything_else_is_no_obstacle(tmp_path):
    (tmp_path / "run.lock").write_text("[1, 2")
    assert enter(tmp_path) == []
