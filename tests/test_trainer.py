"""Runs that are stopped and resumed in the middle of an epoch, in this process.

In tests/test_faults.py, processes are killed.
"""

import os
import shlex
import signal

import pytest
import torch
from test_faults import FLAGS, assert_same_end, steps_saved, write_data

import engine_fractalgen
import main_fractalgen
from engine_fractalgen import Training
from util import checkpoint
from util.run.state import RunState

STEPS = 12  # 3 epochs of 4
RUN = FLAGS.replace("--save_every_steps 1", "--batch_size 4 --seed 3")


def run(data, out, flags: str, stop_after: int | None = None, monkeypatch=None) -> None:
    """Trains into the folder `out`, and gets SIGTERM during step `stop_after`, if that is not None."""
    if stop_after:
        step = Training.after_step

        def after_step(self, epoch, images):
            if self.state.step + 1 == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            step(self, epoch, images)

        monkeypatch.setattr(Training, "after_step", after_step)
    paths = ["--data_path", str(data), "--output_dir", str(out), "--resume", str(out)]
    main_fractalgen.main([*shlex.split(flags), *paths])
    monkeypatch.undo() if monkeypatch else None


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), 34)  # 32 images fill batches, 2 are left over


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    outs = {}
    for amp in ("off", "bf16"):
        outs[amp] = tmp_path_factory.mktemp("whole")
        run(data, outs[amp], f"{RUN} --amp {amp}")
    return outs


@pytest.mark.parametrize(("stop_after", "amp"), [
    (1, "off"), (7, "bf16"),
    *(pytest.param(*both, marks=pytest.mark.slow) for both in ((1, "bf16"), (4, "off"), (4, "bf16"), (7, "off"))),
])  # fmt: skip
def test_stopped_after_any_step_a_run_ends_bit_for_bit_the_same(
    data, whole, tmp_path, monkeypatch, amp, stop_after
):
    run(data, tmp_path, f"{RUN} --amp {amp}", stop_after, monkeypatch)
    assert steps_saved(tmp_path) == stop_after
    run(data, tmp_path, f"{RUN} --amp {amp} --num_workers 2")  # the number of workers changes nothing
    assert_same_end(tmp_path, whole[amp], STEPS)


@pytest.fixture
def diverged(data, tmp_path, monkeypatch):
    """Trains for an epoch, and then with a rate or losses that are far too high. Returns the folder's path."""

    def train(how: str):
        run(data, tmp_path, f"{RUN} --amp off --epochs 1")
        more = "--epochs 8 --save_every_steps 1 --max_bad_steps 5"
        if how == "not finite":
            more += " --lr 1e12 --warmup_epochs 0"
        else:  # the losses of steps 7 and later
            step, calls = engine_fractalgen.train_step, []

            def inflated(*args):
                calls.append(0)
                loss, grad_norm = step(*args)
                return loss * (100 if len(calls) > 2 else 1), grad_norm

            monkeypatch.setattr(engine_fractalgen, "train_step", inflated)
        with pytest.raises(SystemExit, match="2"):
            run(data, tmp_path, f"{RUN} --amp off {more}")
        monkeypatch.undo()
        return tmp_path

    return train


@pytest.mark.parametrize(("how", "healthy", "named"), [
    ("not finite", 4, True), ("finite", 5, False),
    *(pytest.param(*all, marks=pytest.mark.slow) for all in (("not finite", 4, False), ("finite", 5, True))),
])  # fmt: skip
def test_a_run_that_diverged_goes_on_from_its_last_healthy_checkpoint(
    data, diverged, capsys, how, healthy, named
):
    folder = diverged(how)
    path = folder / f"checkpoint-{healthy:08d}.pth"
    assert f"the last healthy checkpoint is {path}: --resume it with a lower --lr" in capsys.readouterr().err
    assert sorted(folder.glob("checkpoint-0*.pth")) == [path, folder / f"checkpoint-{healthy + 1:08d}.pth"]
    flags = f"{RUN} --amp off --lr 1e-4 --warmup_epochs 0 --save_every_steps 1"
    paths = [
        "--data_path",
        str(data),
        "--output_dir",
        str(folder),
        "--resume",
        str(path if named else folder),
    ]
    main_fractalgen.main([*shlex.split(flags), *paths])
    assert f"at step {healthy}: " in capsys.readouterr().out
    assert steps_saved(folder) == STEPS
    weights = torch.load(folder / "checkpoint-last.pth", weights_only=False)["model"]
    assert max(weight.abs().max() for weight in weights.values()) < 10


def test_a_run_that_goes_back_stays_on_its_new_way_when_it_is_stopped_again(
    data, tmp_path, monkeypatch, capsys
):
    run(data, tmp_path, f"{RUN} --amp off --save_every_steps 4")
    assert steps_saved(tmp_path) == STEPS
    paths = ["--data_path", str(data), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(Training, "epochs", lambda self: None)  # ended before the first step
    main_fractalgen.main([*shlex.split(RUN), *paths, "--resume", str(tmp_path / "checkpoint-00000008.pth")])
    monkeypatch.undo()
    capsys.readouterr()
    run(data, tmp_path, f"{RUN} --amp off")
    assert f"resumed {tmp_path}/checkpoint-last.pth at step 8" in capsys.readouterr().out


def test_another_number_of_threads_is_reported(data, tmp_path, monkeypatch, capsys):
    flags = f"{RUN} --amp off --epochs 1"
    run(data, tmp_path, flags, 3, monkeypatch)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    run(data, tmp_path, flags)
    assert (
        f"was written with threads {threads}, now {threads + 1}: not bit for bit the run that was not stopped"
        in capsys.readouterr().out
    )


def test_an_interrupted_evaluation_is_repeated_and_a_complete_one_is_not(data, tmp_path, monkeypatch):
    flags = f"{RUN} --amp off --epochs 1"
    evaluated, compute_nll = [], engine_fractalgen.compute_nll

    def stopped_the_first_time(*args, **settings):
        evaluated.append(0)
        if len(evaluated) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_nll(*args, **settings)

    monkeypatch.setattr(engine_fractalgen, "compute_nll", stopped_the_first_time)
    for _ in range(3):
        run(data, tmp_path, flags)
    assert len(evaluated) == 3  # the second time with the raw weights too
    assert "val/bits_per_dim" in (tmp_path / "log.txt").read_text()


def test_a_run_that_was_trained_on_is_evaluated_again_though_its_log_has_that_step(data, tmp_path, capsys):
    flags = f"{RUN} --amp off --epochs 1"
    run(data, tmp_path, flags)  # an epoch of 4 steps
    run(data, tmp_path, f"{flags} --batch_size 8 --epochs 2 --weight_decay 0.25")  # 2 of 2
    records = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.startswith('{"step": 4, "val/') for line in records].count(True) == 2
    assert "was written with batch_size 4, now 8: not bit for bit" in capsys.readouterr().out
    content = torch.load(tmp_path / "checkpoint-last.pth", weights_only=False)
    assert [group["weight_decay"] for group in content["optimizer"]["param_groups"]] == [0.0, 0.25]
    assert (content["epoch"], content["step"]) == (1, 6)


def script(monkeypatch, averaged: list[float], raw: list[float]) -> None:
    """Lets the evaluations measure these bits/dim of the averaged weights, and of the raw ones."""
    averaged, raw = iter(averaged), iter(raw)
    scores = lambda model, loader, **settings: {"bits_per_dim": next(raw if model.training else averaged)}  # noqa: E731
    monkeypatch.setattr(engine_fractalgen, "compute_nll", scores)


PATIENT = f"{RUN} --amp off --epochs 9 --eval_freq 1 --save_every_steps 4 --keep_last 9 --patience 2"


def test_without_a_better_score_a_run_ends_and_the_best_weights_are_kept(data, tmp_path, monkeypatch, capsys):
    script(monkeypatch, [3.0, 2.0, 2.5, 2.0, 1.5, 9.0, 9.0, 9.0], [1.0, 1.99])
    run(data, tmp_path, PATIENT)
    line = "--patience 2: 2 evaluation(s) after the best, 2.0000 bits/dim at step 8; training ends"
    assert line in capsys.readouterr().out
    assert steps_saved(tmp_path) == 16
    best = checkpoint.load(tmp_path / checkpoint.BEST)
    averaged = checkpoint.load(checkpoint.numbered(tmp_path, 8))["model_ema"]
    for weights in (best["model"], best["model_ema"]):
        assert all(torch.equal(weights[name], averaged[name]) for name in averaged)
    assert (best["step"], best["bits_per_dim"]) == (8, 2.0)
    shown, raw = (
        sorted(path.name for path in (tmp_path / f"samples{end}").iterdir()) for end in ("", "_raw")
    )
    assert shown == [f"step-{step:07d}.png" for step in (4, 8, 12, 16)]
    assert raw == shown[:2]  # then the average was within 1% of the raw weights
    run(data, tmp_path, PATIENT)  # ends again at once
    assert line in capsys.readouterr().out
    assert steps_saved(tmp_path) == 16
    run(data, tmp_path, PATIENT.replace("--patience 2", "--patience 3"))
    assert steps_saved(tmp_path) == 32  # 1.5 at step 20, and three worse ones


def test_a_resumed_run_knows_its_best_score_and_how_long_ago_it_was(data, tmp_path, monkeypatch):
    bits, folder, whole = [3.0, 2.0, 2.5, 2.0], tmp_path / "resumed", tmp_path / "whole"
    script(monkeypatch, bits, [9.0])
    run(data, whole, PATIENT)

    def killed(*arguments):
        raise KeyboardInterrupt

    script(monkeypatch, bits, [9.0])
    run(data, folder, PATIENT, 7, monkeypatch)
    # during the second evaluation; then after it, with its score in the log and its weights in no file
    for place, name in ((main_fractalgen, "draw_sheet"), (checkpoint, "save_best")):
        script(monkeypatch, bits[1:], [])
        monkeypatch.setattr(place, name, killed)
        with pytest.raises(SystemExit, match="130"):
            run(data, folder, PATIENT)
        monkeypatch.undo()
    script(monkeypatch, bits[2:], [])
    run(data, folder, PATIENT, 10, monkeypatch)
    script(monkeypatch, bits[2:], [])
    run(data, folder, PATIENT)
    assert_same_end(folder, whole, 16)
    ours, theirs = (torch.load(path / checkpoint.BEST, weights_only=False) for path in (folder, whole))
    assert (ours["step"], ours["bits_per_dim"]) == (theirs["step"], theirs["bits_per_dim"]) == (8, 2.0)
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])


def test_a_run_from_before_scores_were_kept_goes_on_to_the_bit(data, whole, tmp_path, monkeypatch):
    run(data, tmp_path, f"{RUN} --amp off", 5, monkeypatch)
    path = checkpoint.numbered(tmp_path, 5)
    content = torch.load(path, weights_only=False)
    del content["evaluations"]
    checkpoint.save(tmp_path, content)
    run(data, tmp_path, f"{RUN} --amp off", 10, monkeypatch)
    run(data, tmp_path, f"{RUN} --amp off")
    assert_same_end(tmp_path, whole["off"], STEPS)


@pytest.mark.parametrize("choice", ["continue", "stop"])
def test_best_weights_that_cannot_be_written_obey_on_save_error(data, tmp_path, monkeypatch, capsys, choice):
    def refuse(folder, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_best", refuse)
    script(monkeypatch, [2.0, 1.0], [3.0])
    flags = f"{RUN} --amp off --epochs 2 --eval_freq 1 --on_save_error {choice}"
    if choice == "stop":
        with pytest.raises(SystemExit, match="2"):
            run(data, tmp_path, flags)
    else:
        run(data, tmp_path, flags)
        assert steps_saved(tmp_path) == 8
    said = "".join(capsys.readouterr())
    line = f"{tmp_path}/checkpoint-best.pth could not be written (No space left on device)"
    assert said.count(line) == (2 if choice == "continue" else 1)


def test_the_best_weights_begin_another_run(data, tmp_path, monkeypatch, capsys):
    script(monkeypatch, [2.0, 1.0], [3.0, 3.0])
    flags = f"{RUN} --amp off --epochs 1"
    run(data, tmp_path / "a", flags)
    best = tmp_path / "a" / checkpoint.BEST
    paths = ["--data_path", str(data), "--resume", str(best), "--output_dir"]
    with pytest.raises(SystemExit, match="2"):
        main_fractalgen.main([*shlex.split(flags), *paths, str(tmp_path / "a")])
    assert "a holds the checkpoints of another run" in capsys.readouterr().err
    main_fractalgen.main([*shlex.split(flags), *paths, str(tmp_path / "b")])
    assert f"{best} holds weights only: starting from them at epoch 0" in capsys.readouterr().out


def test_a_checkpoint_with_odd_training_state_is_one_line(data, tmp_path, capsys):
    flags = f"{RUN} --amp off --epochs 1"
    run(data, tmp_path / "a", flags)
    content = torch.load(tmp_path / "a" / "checkpoint-last.pth", weights_only=False)
    for number, odd in enumerate(
        (
            {"optimizer": 3},
            {"place": "x"},
            {"random": [{"python": 1}]},
            {"losses": 3},
            {"evaluations": {"best": [1]}},
        )
    ):
        torch.save({**content, **odd}, tmp_path / f"{number}.pth")
        with pytest.raises(SystemExit, match="2"):
            main_fractalgen.main([*shlex.split(flags), "--data_path", str(data), "--output_dir", str(tmp_path / f"b{number}"),
                                  "--resume", str(tmp_path / f"{number}.pth")])  # fmt: skip
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert f"{number}.pth: its optimizer or random state is not of such a run" in line


def test_an_evaluation_waits_until_the_checkpoint_before_it_is_written(data, tmp_path, monkeypatch):
    """That of a sharded run is written while training goes on, and a signal ends an evaluation at once."""
    events, finish, save, nll = [], RunState.finish, RunState.save, engine_fractalgen.compute_nll

    def watch(name, call):
        def watched(*args, **how):
            found = call(*args, **how)
            events.append(name)
            return found

        return watched

    monkeypatch.setattr(RunState, "finish", watch("finished", finish))
    monkeypatch.setattr(RunState, "save", watch("saved", save))
    monkeypatch.setattr(engine_fractalgen, "compute_nll", watch("measured", nll))
    run(data, tmp_path, f"{RUN} --epochs 1")
    assert events[: events.index("measured") + 1][-3:] == ["saved", "finished", "measured"]
