"""Processes and jobs fill one folder of images together, also where some are killed or the disk is full."""

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from processes import forkserver

from evaluation.gallery import CLAIMS, MANIFEST, Gallery
from util.errors import UserError


def image(index: int) -> Image.Image:
    return Image.fromarray(np.full((4, 4, 3), index, np.uint8))


def draw(indices):
    return [image(index) for index in indices]


def images(folder) -> dict[str, int]:
    return {path.name: int(np.asarray(Image.open(path)).mean()) for path in sorted(folder.glob("*.png"))}


ALL = {f"{index:05d}.png": index for index in range(10)}


def test_each_image_is_drawn_once_and_the_manifest_says_how(tmp_path):
    batches, seen = [], []
    gallery = Gallery(tmp_path, 10, {"seed": 3}, {"versions": "x"}, unit=4)
    drawn = gallery.fill(
        lambda indices: batches.append(indices) or draw(indices), batch_size=3, watch=seen.append
    )
    gallery.close()
    assert batches == [[0, 1, 2], [3], [4, 5, 6], [7], [8, 9]]
    assert (drawn, seen[-1]) == (10, 10)
    assert images(tmp_path) == ALL
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest == {"settings": {"num_images": 10, "seed": 3}, "unit": 4, "versions": "x"}
    assert len(list(tmp_path.iterdir())) == 11
    again = Gallery(tmp_path, 10, {"seed": 3}, {"versions": "y"}, unit=2)
    assert again.fill(lambda indices: pytest.fail("nothing is missing"), batch_size=3) == 0


def test_only_missing_and_incomplete_images_are_drawn(tmp_path):
    Gallery(tmp_path, 10, {}, {}, unit=4).fill(draw, 4)
    (tmp_path / "00006.png").unlink()
    cut = tmp_path / "00002.png"
    cut.write_bytes(cut.read_bytes()[:-1])
    (tmp_path / "00009.png").write_bytes(b"")
    (tmp_path / "00001.png.77.tmp").write_bytes(b"half")
    (tmp_path / "mine.png.77.tmp").write_bytes(b"of someone else")
    drawn = []
    Gallery(tmp_path, 10, {}, {}, unit=4).fill(lambda indices: drawn.extend(indices) or draw(indices), 4)
    assert sorted(drawn) == [2, 6, 9]
    assert images(tmp_path) == ALL
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == ["mine.png.77.tmp"]


def test_arrays_are_written_whole_and_only_what_is_missing_is_drawn_again(tmp_path):
    values = np.random.default_rng(0).integers(0, 1000, (10, 16, 4)).astype(np.uint16)
    draw_arrays = lambda indices: values[indices]  # noqa: E731
    Gallery(tmp_path, 10, {}, {}, unit=4, kind="npy").fill(draw_arrays, 3)
    assert sorted(path.name for path in tmp_path.glob("*.*") if path.name != CLAIMS) == [
        *(f"{index:05d}.npy" for index in range(10)),
        MANIFEST,
    ]
    (tmp_path / "00003.npy").unlink()
    (tmp_path / "00005.npy").write_bytes((tmp_path / "00005.npy").read_bytes()[:-1])
    (tmp_path / "00007.npy").write_bytes((tmp_path / "00007.npy").read_bytes()[:20])
    (tmp_path / "00008.npy").write_bytes(b"")
    (tmp_path / "00001.npy.77.tmp").write_bytes(b"half")
    drawn = []
    again = Gallery(tmp_path, 10, {}, {}, unit=4, kind="npy")
    again.fill(lambda indices: drawn.extend(indices) or draw_arrays(indices), 4)
    assert sorted(drawn) == [3, 5, 7, 8]
    assert not list(tmp_path.glob("*.tmp"))
    for index in range(10):
        found = np.load(tmp_path / f"{index:05d}.npy")
        assert found.dtype == np.uint16
        assert np.array_equal(found, values[index])
    np.save(tmp_path / "00010.npy", values[0])
    with pytest.raises(UserError, match=r"1 images that are none of its 10 \(00010.npy\)"):
        Gallery(tmp_path, 10, {}, {}, unit=4, kind="npy")


def test_processes_begin_apart_and_leave_claimed_images_to_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.gallery.PATIENCE", 0.01)
    gallery, order = Gallery(tmp_path, 10, {}, {}, unit=2), []
    other = FileLock(tmp_path / CLAIMS / "6.lock")
    other.acquire()
    released = time.monotonic() + 0.3

    def note_and_draw(indices):
        order.extend(indices)
        return draw(indices)

    def release_in_the_end(finished):
        if finished == 8 and time.monotonic() > released:
            other.release()

    monkeypatch.setattr(time, "sleep", lambda _: release_in_the_end(10 - len(gallery.missing(range(10)))))
    gallery.fill(note_and_draw, 2, begin_at=0.5)
    assert order == [4, 5, 8, 9, 0, 1, 2, 3, 6, 7]  # the claimed ones last, when the other process has gone
    assert images(tmp_path) == ALL


def test_other_settings_are_refused_and_the_difference_is_named(tmp_path):
    Gallery(tmp_path, 10, {"cfg": 1.5, "classes": [1, 2]}, {}, unit=4)
    with pytest.raises(
        UserError, match=r"was begun with cfg 1.5, not 2.0; give the same settings, or another --output_dir"
    ):
        Gallery(tmp_path, 10, {"cfg": 2.0, "classes": [1, 2]}, {}, unit=4)
    with pytest.raises(UserError, match=r"was begun with num_images 10, not 11"):
        Gallery(tmp_path, 11, {"cfg": 1.5, "classes": [1, 2]}, {}, unit=4)
    Gallery(tmp_path, 10, {"cfg": 1.5, "classes": (1, 2)}, {}, unit=9)


def test_foreign_images_and_damaged_manifests_are_refused(tmp_path):
    image(0).save(tmp_path / "00000.png")
    with pytest.raises(UserError, match=r"holds 1 images and no manifest.json"):
        Gallery(tmp_path, 10, {}, {}, unit=4)
    (tmp_path / "00000.png").unlink()
    Gallery(tmp_path, 10, {}, {}, unit=4)
    image(0).save(tmp_path / "00010.png")
    with pytest.raises(UserError, match=r"1 images that are none of its 10 \(00010.png\)"):
        Gallery(tmp_path, 10, {}, {}, unit=4)
    (tmp_path / "00010.png").unlink()
    for text in ("{", "[]", '{"settings": {}}', '{"settings": 3, "unit": 1}'):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(UserError, match=r"manifest.json: is damaged"):
            Gallery(tmp_path, 10, {}, {}, unit=4)


def fill(folder: Path, begin_at: float) -> None:
    """Fills the folder slowly, in a process of its own.

    A file beside the folder appears when the work has begun; in the end it holds the number of images drawn.
    """
    calls, note = [], folder.with_suffix(f".{os.getpid()}")

    def slowly(indices):
        calls.append(0)
        time.sleep(0.02)
        if len(calls) == 2:
            note.touch()
        return draw(indices)

    note.write_text(str(Gallery(folder, 200, {}, {}, unit=4).fill(slowly, 4, begin_at)))


def test_others_finish_the_work_of_killed_processes(tmp_path):
    """Two jobs on one folder are killed at work; two later ones finish it."""
    folder = tmp_path / "images"

    def start(at: float):
        job = forkserver.Process(target=fill, args=(folder, at), daemon=True)
        job.start()
        return job

    jobs = [start(at) for at in (0.0, 0.5)]
    for job in jobs:
        while not (tmp_path / f"images.{job.pid}").exists():
            assert job.exitcode is None
            time.sleep(0.001)
        os.kill(job.pid, signal.SIGKILL)
        job.join()
    assert sum(1 for _ in folder.glob("*.png")) >= 8
    later = [start(at) for at in (0.0, 0.9)]
    for job in later:
        job.join(60)
        assert job.exitcode == 0
    drawn = [int((tmp_path / f"images.{job.pid}").read_text()) for job in later]
    assert images(folder) == {f"{index:05d}.png": index for index in range(200)}
    assert 0 < sum(drawn) <= 192  # the images that the killed ones had finished were not drawn again


def test_a_job_that_removes_the_claims_does_not_disturb_one_that_begins(tmp_path, monkeypatch):
    acquire, swept = FileLock.acquire, []

    def late(lock, *args, **how):
        if lock.lock_file not in swept:
            swept.append(lock.lock_file)
            shutil.rmtree(tmp_path / CLAIMS)
            raise FileNotFoundError(errno.ENOENT, "the folder goes between filelock's mkdir and open")
        return acquire(lock, *args, **how)

    monkeypatch.setattr(FileLock, "acquire", late)
    assert Gallery(tmp_path, 10, {}, {}, unit=5).fill(draw, 5) == 10
    assert [Path(path).stem for path in swept] == ["manifest", "0", "5"]
    assert images(tmp_path) == ALL


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_locks_works_also_after_a_job_was_killed(tmp_path, monkeypatch, error):
    fcntl = pytest.importorskip("fcntl")

    def refuse(handle, operation):
        raise OSError(error, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / CLAIMS).mkdir()
    for name in ("manifest", "0", "4"):  # as filelock's substitute leaves them on another machine
        (tmp_path / CLAIMS / f"{name}.lock").write_text("12345\nelsewhere\n")
    monkeypatch.setattr("evaluation.gallery.MANIFEST_PATIENCE", 0.1)
    assert Gallery(tmp_path, 10, {}, {}, unit=4).fill(draw, 4) == 10
    assert images(tmp_path) == ALL


def test_a_full_disk_is_one_line_and_leaves_no_incomplete_image(tmp_path, monkeypatch):
    gallery = Gallery(tmp_path, 10, {}, {}, unit=4)

    def save(image, path, kind):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(
        UserError, match=r"00000\.png: cannot be written \(No space left on device\); the others are complete"
    ):
        gallery.fill(draw, 4)
    assert [path.name for path in tmp_path.iterdir() if path.name != CLAIMS] == [MANIFEST]
