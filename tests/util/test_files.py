import hashlib
import json
from pathlib import Path

import pytest

from util.errors import UserError
from util.files import atomic_write, check_writable, make_writable, sha256, write_json


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        _ = temporary.write_text("half of the seco") / 0
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_sha256_is_the_one_of_the_library(tmp_path):
    content = bytes(range(256)) * 9000  # more than one block
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_json_is_written_or_the_error_names_the_file(tmp_path):
    write_json(tmp_path / "scores.json", {"bits": 3.14, "by": {"level0": None}})
    assert json.loads((tmp_path / "scores.json").read_text()) == {"bits": 3.14, "by": {"level0": None}}
    with pytest.raises(
        UserError, match=r"nowhere/scores.json: cannot be written \(No such file or directory\)"
    ):
        write_json(tmp_path / "nowhere" / "scores.json", {})


def test_an_output_that_cannot_be_written_is_named_and_a_probe_leaves_nothing(tmp_path):
    check_writable(tmp_path / "new" / "a.png", "-o a.png")
    assert list((tmp_path / "new").iterdir()) == []
    for path, reason in (
        ("/proc/nowhere/a.png", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / f"{'x' * 300}.png", "File name too long"),
    ):
        with pytest.raises(UserError, match=rf"^-o out: cannot be written \({reason}\)"):
            check_writable(Path(path), "-o out")


def test_a_folder_that_cannot_be_written(tmp_path):
    assert make_writable(tmp_path / "new" / "folder").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output_dir .*/file/out: cannot be written \(Not a directory\)"):
        make_writable(tmp_path / "file" / "out")
