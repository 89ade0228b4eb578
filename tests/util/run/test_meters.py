import json
import resource

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.run.meters import RunLog


def test_records_go_to_tensorboard_and_a_json_line_and_lines_without_a_terminal(tmp_path, capsys):
    with RunLog(tmp_path, enabled=True) as log:
        log.start_epoch(0, 2, 5, 0)
        log.step()
        log.record(5, {"train/loss": 1.5, "train/lr": 0.1})
    assert json.loads((tmp_path / "log.txt").read_text()) == {"step": 5, "train/loss": 1.5, "train/lr": 0.1}
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(5, 1.5)]
    assert capsys.readouterr().out == "step 5  train/loss 1.5  train/lr 0.1\n"


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
        assert not log.has(1, "train/loss")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == "step 1  train/loss 1\nhello\n"


def test_a_terminal_shows_a_bar_with_loss_and_eta_and_validation_as_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with RunLog(tmp_path, enabled=True) as log:
        log.start_epoch(0, 2, 5, 0)
        for _ in range(5):
            log.step()
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
        log.step()
        log.record(1, {"train/loss": 1.0})
        log.say("hello")
        log.note("hello")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""
