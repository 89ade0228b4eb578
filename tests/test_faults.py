"""Training in real processes survives being killed, being stopped and a full disk.

Each test trains a small model through the command line. It compares weights, average, optimiser and random
number generators bit for bit with those of an uninterrupted run. `pytest -m faults` runs the long versions.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import time

import pytest
import torch
from hosts import Hosts, what_is_missing
from processes import Started

from conftest import random_values, save_image
from util import checkpoint

STEPS = 30  # 3 epochs of 10
FLAGS = (
    "--model fractalmar_tiny_in8 --class_num 2 --device cpu --amp off --ema --accum_iter 2 --epochs 3 --warmup_epochs 1 "
    "--lr 1e-3 --grad_checkpointing --num_iter_list 2,2 --eval_freq 9 --save_last_freq 9 --save_every_steps 1 --num_workers 0"
)


def write_data(folder, train: int):
    for split, n in (("train", train), ("val", 4)):
        for i, values in enumerate(random_values(n, 8)):
            save_image(folder / split / str(i % 2) / f"{i:02d}.png", values)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), 82)  # 80 images fill batches, 2 are left over


def start(data, out, *more: str, processes: int = 1, **how) -> Started:
    """Starts training into the folder `out`, resuming from the checkpoint there, if any."""
    paths = ["--data_path", str(data), "--output_dir", str(out), "--resume", str(out)]
    return Started([*FLAGS.split(), f"--batch_size={4 // processes}", *paths, *more], processes, **how)


def finish(process: Started, status: int = 0) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == status, said[-3000:]
    return said


def steps_saved(out) -> int:
    return max((int(path.stem.split("-")[1]) for path in out.glob("checkpoint-0*.pth")), default=0)


def wait_for_step(out, step: int, process: Started) -> None:
    while steps_saved(out) < step:
        assert process.poll() is None, finish(process)
        time.sleep(0.005)


def assert_same_end(out, reference, steps: int = STEPS) -> None:
    """Compares weights, average, optimiser and all random number generators bit for bit."""
    a, b = (checkpoint.load(folder / checkpoint.NAME) for folder in (out, reference))
    assert a["step"] == b["step"] == steps
    for content in (a, b):
        del content["args"]

    def equal(x, y) -> bool:
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(equal(x[key], y[key]) for key in x)
        if isinstance(x, (list, tuple)):
            return len(x) == len(y) and all(map(equal, x, y))
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    assert [key for key in a if not equal(a[key], b[key])] == []


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """Folders of uninterrupted runs, by the number of processes. They save a checkpoint at the end only."""
    outs = {}
    for processes in (1, 2):
        outs[processes] = tmp_path_factory.mktemp("uninterrupted")
        finish(start(data, outs[processes], "--save_every_steps=999", processes=processes))
    return outs


def kill_at_random_moments(data, out, kills: int, seed: int, *more: str, processes: int = 1) -> int:
    """Trains to the end and is killed `kills` times. Returns how many kills interrupted a write."""
    rng, in_a_write = random.Random(seed), 0
    for number in range(kills):
        process = start(data, out, *more, processes=processes)
        goal = STEPS * (number + 1) // (kills + 2)
        wait_for_step(out, max(goal, steps_saved(out) + 1), process)
        time.sleep(rng.random() * 0.2)
        for pid in process.pids:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        in_a_write += any(out.glob("*.tmp")) or not all(
            folder.with_suffix(".pth").exists() for folder in out.glob("*.shards")
        )
        if (out / checkpoint.NAME).exists():
            checkpoint.load(out / checkpoint.NAME)
        for path in out.glob("checkpoint-0*.pth"):
            checkpoint.load(path)
    finish(start(data, out, *more, processes=processes))
    assert not any(out.glob("*.tmp"))
    return in_a_write


def test_killed_three_times_a_run_ends_like_an_uninterrupted_one(data, uninterrupted, tmp_path):
    kill_at_random_moments(data, tmp_path, kills=3, seed=0)
    assert_same_end(tmp_path, uninterrupted[1])


@pytest.mark.faults
def test_killed_24_times_a_run_ends_like_an_uninterrupted_one(data, uninterrupted, tmp_path):
    in_a_write = kill_at_random_moments(data, tmp_path, kills=24, seed=1)
    print(f"24 kills, {in_a_write} of them during a write, 24 resumes, bit-identical end")
    assert_same_end(tmp_path, uninterrupted[1])


@pytest.fixture(scope="module")
def uninterrupted_sharded(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded")
    finish(start(data, out, "--save_every_steps=999", "--shard", processes=2))
    return out


@pytest.mark.faults
def test_killed_twelve_times_a_sharded_run_ends_like_an_uninterrupted_one(
    data, uninterrupted_sharded, tmp_path
):
    kill_at_random_moments(data, tmp_path, 12, 0, "--shard", processes=2)
    assert_same_end(tmp_path, uninterrupted_sharded)


@pytest.mark.parametrize(("processes", "name"), [(1, "SIGUSR1"), (2, "SIGTERM")])
def test_a_signal_saves_and_ends_well_and_the_run_goes_on(data, uninterrupted, tmp_path, processes, name):
    process = start(data, tmp_path, "--save_every_steps=999", processes=processes)
    log = tmp_path / "log.txt"
    while not log.exists() or '"step"' not in log.read_text():
        assert process.poll() is None, finish(process)
        time.sleep(0.01)
    began = time.monotonic()
    os.kill(process.pids[-1], getattr(signal, name))  # one process gets the signal, all stop
    said = finish(process)
    assert time.monotonic() - began < 30
    assert re.search(rf"{name} at step \d+: stopped; --resume {tmp_path} goes on", said)
    assert 0 < steps_saved(tmp_path) < STEPS
    finish(start(data, tmp_path, "--save_every_steps=999", processes=processes))
    assert_same_end(tmp_path, uninterrupted[processes])


def kill_one_rank(data, out, step: int, rank: int) -> str:
    """Kills a rank after `step`. Training must end with the one restart that torchrun allows."""
    process = start(data, out, processes=2, torchrun="--max_restarts=1")
    wait_for_step(out, step, process)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pids[0])], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(workers[rank]), signal.SIGKILL)
    return finish(process)


def test_torchrun_restarts_and_goes_on_where_a_rank_dies(data, uninterrupted, tmp_path):
    said = kill_one_rank(data, tmp_path, step=7, rank=1)
    assert re.search(r"resumed .*checkpoint-last.pth at step \d+", said)
    assert_same_end(tmp_path, uninterrupted[2])


@pytest.mark.faults
def test_torchrun_restarts_ten_times_of_ten(data, uninterrupted, tmp_path):
    for number in range(10):
        kill_one_rank(data, tmp_path / str(number), step=2 + 2 * number, rank=number % 2)
        assert_same_end(tmp_path / str(number), uninterrupted[2])


def stop_in_the_middle(data, out) -> int:
    """Stops a run with SIGTERM after 13 steps or more. Returns the number of steps it had done."""
    process = start(data, out)
    wait_for_step(out, 13, process)
    os.kill(process.pids[0], signal.SIGTERM)
    finish(process)
    return steps_saved(out)


def test_all_processes_end_together_when_the_patience_is_over(data, tmp_path):
    """With a rate of 0 no evaluation is better than the first."""
    flags = "--lr 0 --save_every_steps=999 --eval_freq 1 --patience 1 --online_eval --num_images 2"
    said = finish(start(data, tmp_path, *flags.split(), processes=2))
    assert said.count("--patience 1: 1 evaluation(s) after the best") == 1
    assert steps_saved(tmp_path) == 20
    best = checkpoint.load(tmp_path / checkpoint.BEST)
    assert best["step"] == 10
    assert sorted(path.name for path in tmp_path.glob("generated-*")) == [
        "generated-0000010",
        "generated-0000020",
    ]


def test_another_number_of_processes_goes_on_with_the_same_order(data, uninterrupted, tmp_path):
    at = stop_in_the_middle(data, tmp_path)
    said = finish(start(data, tmp_path, "--save_every_steps=999", processes=2))
    assert (
        f"resumed {tmp_path}/checkpoint-last.pth at step {at}: epoch {at // 10}, {at % 10 * 8} of its images done"
        in said
    )
    assert (
        "was written with processes 1, now 2; batch_size 4, now 2: not bit for bit the run that was not stopped"
        in said
    )
    assert checkpoint.load(tmp_path / checkpoint.NAME)["step"] == STEPS


@pytest.mark.parametrize("choice", ["continue", "stop"])
def test_a_full_disk_keeps_the_old_checkpoint_and_obeys_on_save_error(data, uninterrupted, tmp_path, choice):
    at = stop_in_the_middle(data, tmp_path)
    size = (tmp_path / checkpoint.NAME).stat().st_size
    # status 2 even if training continued, because the last checkpoint was not written
    said = finish(start(data, tmp_path, "--on_save_error", choice, max_file_size=size // 2), status=2)
    step = STEPS if choice == "continue" else at + 1
    error = f"the checkpoint of step {step} could not be written (File too large); checkpoint-{at:08d}.pth is whole"
    assert said.splitlines()[-1].endswith(error)
    assert said.count("training goes on (--on_save_error continue)") == (
        STEPS - at if choice == "continue" else 0
    )
    assert steps_saved(tmp_path) == checkpoint.load(tmp_path / checkpoint.NAME)["step"] == at
    if choice == "continue":
        finish(start(data, tmp_path))
        assert_same_end(tmp_path, uninterrupted[1])


def test_a_damaged_newest_checkpoint_costs_one_interval_and_no_bit(data, uninterrupted, tmp_path):
    at = stop_in_the_middle(data, tmp_path)
    newest = tmp_path / f"checkpoint-{at:08d}.pth"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    said = finish(start(data, tmp_path))
    assert f"{tmp_path}/checkpoint-last.pth: damaged, its SHA-256" in said
    assert f"resumed {tmp_path}/checkpoint-{at - 1:08d}.pth at step {at - 1}" in said
    assert_same_end(tmp_path, uninterrupted[1])


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_dead(data, tmp_path):
    first = start(data, tmp_path)
    wait_for_step(tmp_path, 1, first)
    settings = (tmp_path / "settings.json").read_text()
    for processes in (1, 2):
        said = finish(start(data, tmp_path, "--lr=3e-3", "--seed=2", processes=processes), status=2)
        who = f"--output_dir {tmp_path}: process {first.pids[0]} on {socket.gethostname()} is training there"
        assert said.count(who) == processes
    assert (tmp_path / "settings.json").read_text() == settings
    os.kill(first.pids[0], signal.SIGKILL)
    first.communicate()
    assert "resumed" in finish(start(data, tmp_path))
    assert steps_saved(tmp_path) == STEPS


def test_a_folder_of_another_run_is_not_overwritten(data, tmp_path):
    finish(start(data, tmp_path, "--epochs=1"))
    said = finish(start(data, tmp_path, "--resume="), status=2)
    assert f"--output_dir {tmp_path} holds the checkpoints of another run; give --resume {tmp_path}" in said
    # torchrun's processes are refused at the start and again after the restart.
    restarted = start(data, tmp_path, "--resume=", torchrun="--max_restarts=1")
    assert "resumed" not in finish(restarted, status=1)
    assert json.loads((tmp_path / "settings.json").read_text())["settings"]["epochs"] == 1


@pytest.fixture(scope="module")
def hosts_allowed():
    if (reason := what_is_missing()) is not None:
        pytest.skip(reason)


def start_on(hosts: Hosts, number: int, data, out, *more: str, torchrun: str = "") -> Started:
    """Starts training on a host, one process a host, as `start` does."""
    paths = ["--data_path", str(data), "--output_dir", str(out), "--resume", str(out)]
    flags = [*FLAGS.split(), f"--batch_size={4 // len(hosts.names)}", *paths, *more]
    return hosts.start(number, flags, torchrun=torchrun)


@pytest.mark.faults
def test_a_host_that_dies_comes_back_and_all_ends_as_on_one_machine(
    data, uninterrupted, tmp_path, hosts_allowed
):
    with Hosts(2) as hosts:
        runs = [start_on(hosts, number, data, tmp_path, torchrun="--max_restarts=3") for number in range(2)]
        wait_for_step(tmp_path, 12, runs[0])
        hosts.kill(1)
        runs[1] = start_on(hosts, 1, data, tmp_path, torchrun="--max_restarts=3")
        said = finish(runs[0])
        finish(runs[1])
    assert "process 0 of 2 on " in said
    assert "another process has ended" in said
    assert "resumed" in said
    assert_same_end(tmp_path, uninterrupted[2])


@pytest.mark.faults
def test_four_hosts_train_as_four_processes_of_one(data, tmp_path, hosts_allowed):
    seldom = "--save_every_steps=999"  # how many losses are summed at once decides their order
    finish(start(data, tmp_path / "one", seldom, processes=4))
    with Hosts(4) as hosts:
        for run in [start_on(hosts, number, data, tmp_path / "four", seldom) for number in range(4)]:
            finish(run)
    assert_same_end(tmp_path / "four", tmp_path / "one")


TROUBLE = {
    "cut": lambda hosts: hosts.cut(1),
    "stopped": lambda hosts: [os.kill(pid, signal.SIGSTOP) for pid in hosts.pids(1)],
    "slow": lambda hosts: hosts.limit(1, 0.02),
}


@pytest.mark.parametrize(
    "trouble", ["cut", *(pytest.param(x, marks=pytest.mark.faults) for x in ("stopped", "slow"))]
)
def test_a_host_that_does_not_answer_ends_the_run_in_time_with_a_line(data, tmp_path, hosts_allowed, trouble):
    with Hosts(2) as hosts:
        runs = [
            start_on(hosts, number, data, tmp_path, "--dist_timeout=5", "--epochs=99") for number in range(2)
        ]
        wait_for_step(tmp_path, 2, runs[0])
        began = time.monotonic()
        TROUBLE[trouble](hosts)
        said = finish(runs[0], status=1)  # torchrun's
    assert time.monotonic() - began < 5 + 25
    line = f"process 0 of 2 on {socket.gethostname()}: no answer from the others for 5 s (--dist_timeout)"
    assert said.count(f"main_fractalgen.py: error: {line}") == 1
