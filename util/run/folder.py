"""The folder of a run: its lock, and the checkpoint in it from which the run continues."""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from util import checkpoint, dist
from util.dist import World
from util.errors import UserError
from util.files import remove_stale, try_lock

SETTINGS, LOCK = "settings.json", "run.lock"
TAKEOVER = 60.0  # seconds; torchrun gives its processes 30 to end by themselves


@contextmanager
def sole_run(folder: Path | None, world: World, say: Callable[[str], None]) -> Iterator[None]:
    """Within this block no other run can write into `folder`. All processes must enter it.

    The first process holds a lock (`try_lock`) that ends with it. Raises UserError, on all processes, that
    names the process which has the lock. After a restart by torchrun the process before may still be ending:
    it is given TAKEOVER seconds. On a file system without locks `say` is called with a line.
    """
    held = []

    def take() -> None:
        us = {"host": socket.gethostname(), "pid": os.getpid(), "run_id": dist.job()["run_id"]}
        give_up = time.monotonic() + TAKEOVER
        while not held:
            try:
                file, owner = try_lock(folder / LOCK, us)
            except (OSError, ImportError) as error:
                say(f"{folder}: cannot be locked ({error}); start no second run in it")
                return
            if file is not None:
                held.append(file)
            elif dist.restarts() and owner.get("run_id") == us["run_id"] and time.monotonic() < give_up:
                time.sleep(0.1)
            else:
                who = f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')}"
                raise UserError(
                    f"--output_dir {folder}: {who} is training there; wait for it, or give another folder"
                )

    if folder is not None:
        dist.on_main(world, take)
    try:
        yield
    finally:
        for file in held:
            with suppress(OSError):  # a full disk
                file.close()


def began_here(folder: Path) -> bool:
    """Whether the run in `folder` was begun by this very job, before torchrun restarted its processes."""
    try:
        return json.loads((folder / SETTINGS).read_text())["job"] == dist.job()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def clean(folder: Path) -> None:
    """Removes the unfinished files of a run that was killed."""
    remove_stale(folder)
    for path in folder.glob(f"{checkpoint.NUMBERED}.sha256"):
        if not path.with_suffix("").exists():
            path.unlink(missing_ok=True)
    for path in folder.glob(str(checkpoint.shards_of(Path(checkpoint.NUMBERED)))):
        if not path.with_suffix(".pth").exists():
            shutil.rmtree(path, ignore_errors=True)


def check_room(folder: Path, size: int, say: Callable[[str], None]) -> None:
    """Says a line if the folder has no room for two checkpoints of `size` bytes."""
    free = shutil.disk_usage(folder).free
    if free + sum(map(checkpoint.size, checkpoint.list_numbered(folder))) < 2 * size:
        say(
            f"{folder}: {free / 2**30:.3g} GiB are free, too little for two checkpoints of "
            f"{size / 2**30:.3g} GiB: one stays while the next is written, and that will fail"
        )


def candidates(path: Path) -> list[Path]:
    """The files to try, in order: `path` and, if it is a checkpoint-last.pth, the others beside it.

    Empty if there is none, as at the beginning of a run.
    """
    if path.name != checkpoint.NAME:
        return [path] if path.exists() else []
    files = checkpoint.list_numbered(path.parent)
    if not path.exists():  # the run was killed before it linked its first checkpoint
        return files
    for place, file in enumerate(files):
        if file.samefile(path):  # newer ones are those that the run went back from
            return [path, *files[place + 1 :], *files[:place]]
    return [*files, path]  # a file system without links: the copy may be older than the others


def load_newest(path: Path, say: Callable[[str], None], load=checkpoint.load) -> tuple[Path, dict]:
    """Loads the first undamaged file of `candidates(path)` by `load`. Returns its path and its content.

    `say` is called with a line on each damaged file. Raises UserError if all are damaged.
    """
    first = None
    for candidate in candidates(path) or [path]:
        try:
            return candidate, load(candidate)
        except UserError as error:
            first = first or error
            say(f"{error}; trying the one before")
    raise first


def find_origin(resume: str, folder: Path | None) -> Path | None:
    """The checkpoint from which a run in `folder` continues: `resume`'s, or after a restart its own.

    None where there is none yet. Raises UserError where the folder holds checkpoints of another run.
    """
    path = checkpoint.locate(resume) if resume else None
    if folder is None:
        return path
    own = folder / checkpoint.NAME
    found = candidates(own)
    if dist.restarts() and found and began_here(folder):
        return own
    same_folder = path is not None and path.parent.resolve() == folder.resolve()
    weights_only = (checkpoint.SAFETENSORS_NAME, checkpoint.BEST)
    same_folder = same_folder and path.name not in weights_only  # they begin another run
    if found and not same_folder:
        raise UserError(
            f"--output_dir {folder} holds the checkpoints of another run; give --resume {folder} to go on "
            "with it, or another --output_dir"
        )
    return None if same_folder and path.name == own.name and not found else path
