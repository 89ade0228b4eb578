"""Threads: as many as there are free cores, and no endless spinning."""

import os
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT
from util import threads


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Eight cores, none of them busy, no quota and nothing in the environment; torch has eight threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    monkeypatch.setattr(threads, "busy_cores", lambda: 0.0)
    for name in (*threads.SETTINGS, "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    now = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: now.__setitem__(0, number))
    return monkeypatch, tmp_path


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu.max": "nonsense"}, 8),
    ],
)
def test_usable_cores_are_those_of_affinity_and_quota(machine, files, cores):
    _, folder = machine
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    assert threads.usable_cores() == cores


@pytest.mark.parametrize(
    ("busy", "environment", "expected"),
    [
        (0.0, {}, 8),
        (2.9, {}, 5),
        (7.9, {}, 1),
        (50.0, {}, 1),
        (0.0, {"LOCAL_WORLD_SIZE": "4"}, 2),
        (0.0, {"OMPI_COMM_WORLD_LOCAL_SIZE": "16"}, 1),
        (7.9, {"OMP_NUM_THREADS": "8"}, 8),
    ],
)
def test_threads_are_limited_to_this_process_s_share_of_the_free_cores(machine, busy, environment, expected):
    monkeypatch, _ = machine
    monkeypatch.setattr(threads, "busy_cores", lambda: busy)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert f"CPU threads: {expected} of 8 cores, of which others use {busy:.1f}" in threads.limit_threads()
    assert torch.get_num_threads() == expected


def test_a_user_s_smaller_number_of_threads_stays(machine):
    torch.set_num_threads(3)
    threads.limit_threads()
    assert torch.get_num_threads() == 3


def test_what_other_processes_use_is_measured(monkeypatch):
    """From the start to now: 10 seconds, in which all processes used 12 and this one 2.5 seconds of its cores."""
    monkeypatch.setattr(threads, "_STARTED", (100.0, 50.0, 1.0))
    monkeypatch.setattr(threads, "_times", lambda: (110.0, 62.0, 3.5))
    assert threads.busy_cores() == pytest.approx(0.95)


def test_the_times_are_those_of_the_machine_and_of_this_process():
    before, until = threads._times(), time.process_time() + 0.2
    while time.process_time() < until:
        pass
    secs, used, own = (now - then for now, then in zip(threads._times(), before, strict=True))
    assert own == pytest.approx(0.2, abs=0.05)
    assert own - 0.05 < used < secs * os.cpu_count() + 0.05


@pytest.mark.parametrize(
    ("environment", "loaded", "expected"),
    [
        ({}, False, str(threads.SPIN)),
        ({}, True, None),
        ({"GOMP_SPINCOUNT": "7"}, False, "7"),
        ({"OMP_WAIT_POLICY": "active"}, False, None),
    ],
)
def test_spinning_is_bounded_unless_the_user_says_or_torch_is_loaded(machine, environment, loaded, expected):
    monkeypatch, _ = machine
    monkeypatch.setattr(sys, "modules", {"torch": torch} if loaded else {})
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    threads.bound_spinning()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


@pytest.mark.parametrize("first", ["main_fractalgen", "models.noise"])
def test_programs_and_the_library_load_it_before_torch(first):
    program = (
        "import sys, importlib.abc\n"
        "class Watch(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch':\n"
        "            import os\n"
        "            sys.exit(f'spin {os.environ[\"GOMP_SPINCOUNT\"]}')\n"
        f"sys.meta_path.insert(0, Watch())\nimport {first}"
    )
    clean = {name: value for name, value in os.environ.items() if name not in threads.SETTINGS}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=clean, capture_output=True, text=True, check=False
    )
    assert result.stderr.strip() == f"spin {threads.SPIN}"
