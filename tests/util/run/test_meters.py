import json
import resource

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.run.meters import RunLog

LOSS = torch.tensor(2.5)


def test_records_go_to_tensorboard_and_a_json_line_and_to_standard_output(tmp_path, capsys):
    with RunLog(tmp_path, enabled=True) as log:
        log.record(5, {"train/loss": 1.5, "train/lr": 0.1})
    assert json.loads((tmp_path / "log.txt").read_text()) == {"step": 5, "train/loss": 1.5, "train/lr": 0.1}
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(5, 1.5)]
    assert capsys.readouterr().out == "step 5  train/loss 1.5  train/lr 0.1\n"


def test_without_a_terminal_there_is_a_line_every_30_seconds(tmp_path, capsys, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    said = []
    with RunLog(tmp_path, enabled=True) as log:
        for epoch in range(2):
            log.start_epoch(epoch, 2, 60, 0)
            for step in range(epoch * 60 + 1, epoch * 60 + 61):
                now += 10 if step > 60 else 1
                log.step(LOSS, 12)
                if step % 20 == 0:
                    log.record(step, {"train/loss": step / 100, "train/memory_gib": 1.3})
                said += [(step, line) for line in capsys.readouterr().out.splitlines()]
        log.record(120, {"val/bits_per_dim": 3.25})
    assert said[:3] == [
        (20, "step 20 of 120, loss 0.2, 12 images/s, 01:40 left, 1.3 GiB"),  # the first record
        (
            50,
            "step 50 of 120, loss 0.4, 12 images/s, 01:10 left, 1.3 GiB",
        ),  # 30 s later, with the last record's loss
        (62, "step 62 of 120, loss 0.6, 4.8 images/s, 01:14 left, 1.3 GiB"),
    ]
    assert said[3] == (
        65,
        "step 65 of 120, loss 2.5, 1.2 images/s, 01:33 left, 1.3 GiB",
    )  # none: the step's own loss
    assert [step for step, _ in said[3:]] == [*range(65, 120, 3), 120]
    assert said[-1][1] == "step 120 of 120, loss 1.2, 1.2 images/s, 00:00 left, 1.3 GiB"
    assert capsys.readouterr().out == "step 120  val/bits_per_dim 3.25\n"


def test_a_record_is_found_by_its_step_and_name_and_the_last_one_counts(tmp_path):
    with RunLog(tmp_path, enabled=True) as log:
        log.record(1, {"val/bits_per_dim": 4.0})
        log.record(1, {"val/bits_per_dim": 1 / 3})
        log.record(1, {"train/loss": 2.0})
        log.record(12, {"val/bits_per_dim": 2.0})
        (tmp_path / "log.txt").open("a").write('{"step": 1, "val/bits_per_dim": 2.')  # the disk was full
        assert log.find(1, "val/bits_per_dim") == {"step": 1, "val/bits_per_dim": 1 / 3}
        assert log.find(2, "val/bits_per_dim") is None


def test_a_full_disk_is_one_line_and_what_is_missing_is_written_later(tmp_path, capsys):
    """The kernel's limit on the size of files stands in for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunLog(tmp_path, enabled=True) as log:
        log.record(1, {"train/loss": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            for step in (2, 3):
                log.record(step, {"train/loss": float(step)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        log.record(4, {"train/loss": 4.0})
    out, err = capsys.readouterr()
    assert out.count("figures could not be written (File too large)") == 1
    assert err == ""
    assert [json.loads(line)["step"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
    ]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


def test_without_a_folder_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunLog(None, enabled=True) as log:
        log.record(1, {"train/loss": 1.0})
        log.image(1, "samples", None)
        log.note("hello")
        assert log.find(1, "train/loss") is None
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == "step 1  train/loss 1\nhello\n"


def test_a_terminal_shows_a_bar_with_loss_and_eta_and_validation_as_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with RunLog(tmp_path, enabled=True) as log:
        log.start_epoch(0, 2, 5, 0)
        for _ in range(5):
            log.step(LOSS, 4)
        log.record(5, {"train/loss": 1.5, "train/lr": 0.1})
        log.record(5, {"val/bits_per_dim": 3.25})
        log.start_epoch(1, 2, 5, 0)
        log.bar.refresh()
    out, err = capsys.readouterr()
    assert out == "step 5  val/bits_per_dim 3.25\n"
    assert "epoch 2/2" in err
    assert "5/10" in err
    assert "loss=1.5" in err.splitlines()[-1]


def test_a_note_is_kept_and_a_name_that_is_no_text_can_be_printed(tmp_path, capsys):
    # "panda" in GBK; its last two bytes happen to be valid UTF-8
    name = b"\xd0\xdc\xc3\xa8".decode(errors="surrogateescape") + "猫"
    with RunLog(tmp_path, enabled=True) as log:
        log.note(name)
    assert json.loads((tmp_path / "log.txt").read_text()) == {"note": name}
    assert capsys.readouterr().out == "\\udcd0\\udcdcè猫\n"


def test_other_processes_write_nothing(tmp_path, capsys):
    with RunLog(tmp_path, enabled=False) as log:
        log.start_epoch(0, 1, 1, 0)
        log.step(LOSS, 4)
        log.record(1, {"train/loss": 1.0})
        log.say("hello")
        log.note("hello")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""
