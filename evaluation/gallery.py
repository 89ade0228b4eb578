"""A folder of numbered images that processes, and jobs on other machines, draw together, each image once.

An image is a PNG file, or a .npy file of values (*shape, C) where it is no image of 8 bits.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from util.errors import UserError, reading
from util.files import atomic_write, write_json

MANIFEST, CLAIMS = "manifest.json", ".claims"
END_OF_PNG = b"IEND\xaeB`\x82"
PATIENCE = 1.0  # seconds between two looks at what others have drawn
MANIFEST_PATIENCE = 60.0  # seconds to wait while another process writes the manifest


class Gallery:
    """Images `folder`/00000.png, 00001.png, … (`number` of them), and how they were made in manifest.json.

    settings  all that decides the images; raises UserError for a folder that was begun with other settings
    notes     what else the manifest shall say of the run that began the folder
    unit      images that a process claims at once; the run that began the folder decides
    kind      "png", or "npy" for arrays
    """

    def __init__(self, folder: Path, number: int, settings: dict, notes: dict, unit: int, kind: str = "png"):
        self.folder, self.number, self.kind = folder, number, kind
        folder.mkdir(parents=True, exist_ok=True)
        path, images = folder / MANIFEST, {image.name for image in folder.glob(f"*.{kind}")}
        settings = json.loads(
            json.dumps({"num_images": number, **settings})
        )  # lists for tuples, as in the file
        with self._claim("manifest", MANIFEST_PATIENCE):
            if images and not path.exists():
                raise UserError(
                    f"{folder}: holds {len(images)} images and no {MANIFEST} that says "
                    "how they were made; empty it"
                )
            if not path.exists():
                write_json(path, {"settings": settings, "unit": unit, **notes})
        with reading(path, "is damaged", "; remove it and the images beside it"):
            manifest = json.loads(path.read_text())
            before, unit = dict(manifest["settings"]), int(manifest["unit"])
        for name, value in settings.items():
            if before.get(name) != value:
                raise UserError(
                    f"{folder}: was begun with {name} {before.get(name)!s:.60}, not {value!s:.60}; "
                    "give the same settings, or another --output_dir"
                )
        others = images - {self.path(index).name for index in range(number)}
        if others:
            raise UserError(
                f"{folder}: holds {len(others)} images that are none of its {number} ({min(others)}); "
                "remove them"
            )
        self.units = [range(first, min(first + unit, number)) for first in range(0, number, unit)]
        self.finished: set[int] = set()

    def path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.{self.kind}"

    def missing(self, indices: Sequence[int]) -> list[int]:
        """Returns the `indices` whose image is missing, or incomplete, as a power failure may leave it."""
        unknown = [index for index in indices if index not in self.finished]
        self.finished.update(index for index in unknown if _is_complete(self.path(index)))
        return [index for index in unknown if index not in self.finished]

    def fill(
        self,
        draw: Callable[[list[int]], Sequence[Image.Image | np.ndarray]],
        batch_size: int,
        begin_at: float = 0.0,
        watch: Callable[[int], None] = lambda finished: None,
    ) -> int:
        """Draws the missing images until all are there. Returns the number that this process has drawn.

        draw      numbers of images, at most `batch_size` -> their images
        begin_at  where in the folder to begin, in 0..1, so that processes do not meet; the start comes last
        watch     called now and then with the number of images that are there, whoever drew them
        """
        first, drawn, looked = int(begin_at * len(self.units)), 0, time.monotonic()
        waiting = self.units[first:] + self.units[:first]
        while waiting := [unit for unit in waiting if self.missing(unit)]:
            before = drawn
            for unit in waiting:
                with self._claim(str(unit.start), unit=unit) as granted:
                    missing = self.missing(unit) if granted else []
                    for i in range(0, len(missing), batch_size):
                        self._save(missing[i : i + batch_size], draw)
                drawn += len(missing)
                if time.monotonic() - looked > PATIENCE:
                    watch(self.number - len(self.missing(range(self.number))))
                    looked = time.monotonic()
            if drawn == before:
                time.sleep(PATIENCE)  # others draw the rest; if one of them is killed, its claim becomes free
        watch(self.number)
        return drawn

    def _save(
        self, batch: list[int], draw: Callable[[list[int]], Sequence[Image.Image | np.ndarray]]
    ) -> None:
        for index, image in zip(batch, draw(batch), strict=True):
            path = self.path(index)
            with (
                reading(path, "cannot be written", "; the others are complete, start again"),
                atomic_write(path, durable=False) as temporary,
            ):
                if self.kind == "png":
                    image.save(temporary, "PNG")
                else:
                    with open(temporary, "wb") as file:  # given a name, NumPy would append .npy to it
                        np.save(file, image, allow_pickle=False)

    @contextmanager
    def _claim(self, name: str, patience: float = 0, unit: range = range(0)) -> Iterator[bool]:
        """Whether this process may work on `unit`; not if another one still does after `patience` seconds.

        The system frees the claim of a killed process. On a file system without locks every claim is granted:
        then two processes may draw the same image, which does no harm.
        """
        lock = FileLock(self.folder / CLAIMS / f"{name}.lock", fallback_to_soft=False)
        granted = True
        while True:
            try:
                (self.folder / CLAIMS).mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=patience)
            except FileNotFoundError:  # another job has finished and removed the folder in between
                continue
            except Timeout:
                granted = False
            except (NotImplementedError, OSError):
                pass  # no locks here
            break
        try:
            if lock.is_locked:
                paths = {self.path(index) for index in unit}
                for stale in self.folder.glob(f"*.{self.kind}.*.tmp"):
                    if stale.with_suffix("").with_suffix("") in paths:  # left by a process that was killed
                        stale.unlink(missing_ok=True)
            yield granted
        finally:
            lock.release()

    def close(self) -> None:
        """Removes the claims. Any process may call it once all images are there."""
        shutil.rmtree(self.folder / CLAIMS, ignore_errors=True)


def _is_complete(path: Path) -> bool:
    try:
        if path.suffix == ".npy":
            np.lib.format.open_memmap(path, mode="r")  # fails where the file is shorter than it says
            return True
        with open(path, "rb") as file:
            file.seek(-len(END_OF_PNG), 2)
            return file.read() == END_OF_PNG
    except (OSError, ValueError):  # missing, or shorter than that
        return False
