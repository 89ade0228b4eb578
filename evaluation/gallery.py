"""A folder of numbered images that processes, and jobs on other machines, fill together: each once, whole, in any order."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout
from PIL import Image

from util.errors import UserError
from util.files import atomic_write, write_json

MANIFEST, CLAIMS = "manifest.json", ".claims"
END_OF_PNG = b"IEND\xaeB`\x82"
PATIENCE = 1.0  # seconds between two looks at what others are drawing
MANIFEST_PATIENCE = 60.0  # seconds for others to write the manifest


class Gallery:
    """`folder`/00000.png, 00001.png, … up to `number`, and manifest.json, which says how they came about.

    settings  what decides the images; a folder that was begun with others is refused with a UserError
    notes     what else is worth knowing of the run that began it
    unit      images that a process claims at once; the run that began the folder decides
    """

    def __init__(self, folder: Path, number: int, settings: dict, notes: dict, unit: int):
        self.folder, self.number = folder, number
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps({"num_images": number, **settings}))  # as they are read back
        with self._claim("manifest", patience=MANIFEST_PATIENCE):
            manifest = self._manifest()
            if manifest is None:
                manifest = {"settings": settings, "unit": unit, **notes}
                write_json(folder / MANIFEST, manifest)
        for name, value in settings.items():
            if (before := manifest["settings"].get(name)) != value:
                raise UserError(
                    f"{folder}: was begun with {name} {_short(before)}, not {_short(value)}; "
                    "give the same settings, or another --output_dir"
                )
        others = {path.name for path in folder.glob("*.png")} - {
            self.path(index).name for index in range(number)
        }
        if others:
            raise UserError(
                f"{folder}: holds {len(others)} images that are none of its {number} ({min(others)}); remove them"
            )
        unit = int(manifest["unit"])
        self.units = [range(first, min(first + unit, number)) for first in range(0, number, unit)]
        self.there: set[int] = set()
        self.looked = time.monotonic()

    def _manifest(self) -> dict | None:
        path = self.folder / MANIFEST
        if not path.exists():
            if images := len(list(self.folder.glob("*.png"))):
                raise UserError(
                    f"{self.folder}: holds {images} images and no {MANIFEST} that says how they came about; empty it"
                )
            return None
        try:
            manifest = json.loads(path.read_text())
            return {**manifest, "settings": dict(manifest["settings"]), "unit": max(1, int(manifest["unit"]))}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is damaged; remove it and the images beside it") from error

    def path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.png"

    def missing(self, indices: Sequence[int]) -> list[int]:
        """Those whose image is not there, or not to its last byte (as the power's failing may leave it)."""
        self.there.update(
            index for index in indices if index not in self.there and _is_whole(self.path(index))
        )
        return [index for index in indices if index not in self.there]

    def fill(
        self,
        draw: Callable[[list[int]], Sequence[Image.Image]],
        batch_size: int,
        begin_at: float = 0.0,
        watch: Callable[[int], None] = lambda there: None,
    ) -> int:
        """Draws what is missing, `batch_size` at most together, until all are there. Returns how many this process drew.

        draw      numbers of images -> images
        begin_at  share of the way at which to begin, so that processes do not meet: then on to the end, and around
        watch     called with the number of images that are there, whoever drew them
        """
        first, drawn = int(begin_at * len(self.units)), 0
        waiting = self.units[first:] + self.units[:first]
        while waiting := [unit for unit in waiting if self.missing(unit)]:
            before = drawn
            for unit in waiting:
                with self._claim(str(unit.start), unit) as mine:
                    missing = self.missing(unit) if mine else []
                    for batch in (missing[i : i + batch_size] for i in range(0, len(missing), batch_size)):
                        for index, image in zip(batch, draw(batch), strict=True):
                            self._save(index, image)
                        drawn += len(batch)
                        self._look(watch)
            if drawn == before:
                time.sleep(
                    PATIENCE
                )  # the rest is being drawn by others; who takes over where one of them is killed
        watch(self.number)
        return drawn

    def _look(self, watch: Callable[[int], None]) -> None:
        if time.monotonic() - self.looked > PATIENCE:
            watch(self.number - len(self.missing(range(self.number))))
            self.looked = time.monotonic()

    def close(self) -> None:
        """Tidies up. Every process may call it, once all images are there."""
        shutil.rmtree(self.folder / CLAIMS, ignore_errors=True)

    @contextmanager
    def _claim(self, name: str, unit: range = range(0), patience: float = 0) -> Iterator[bool]:
        """Whether no other process is at work on these, after at most `patience` seconds. The system gives a claim back where
        its process is killed; on a file system without locks all claims are granted: two may draw the same image, no harm."""
        lock, mine, locked = FileLock(self.folder / CLAIMS / f"{name}.lock"), True, False
        try:
            locked = self._acquire(lock, patience)
        except Timeout:
            mine = isinstance(lock, SoftFileLock)
        except (NotImplementedError, OSError):
            pass  # no locks here: granted
        try:
            if locked:
                for stale in self.folder.glob(
                    "*.png.*.tmp"
                ):  # of a process that was killed: nobody else writes these
                    number = stale.name.partition(".")[0]
                    if number.isdecimal() and int(number) in unit:
                        stale.unlink(missing_ok=True)
            yield mine
        finally:
            lock.release()

    def _acquire(self, lock: FileLock, patience: float) -> bool:
        """Whether the system holds the lock, and not a file that would outlive us, to which filelock resorts without locks."""
        while True:
            (self.folder / CLAIMS).mkdir(exist_ok=True)
            try:
                lock.acquire(timeout=patience)
                return not isinstance(lock, SoftFileLock)
            except FileNotFoundError:  # another job is done, and has tidied up since
                continue

    def _save(self, index: int, image: Image.Image) -> None:
        try:
            with atomic_write(self.path(index), durable=False) as temporary:
                image.save(temporary, "PNG")
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"{self.path(index)}: cannot be written ({reason}); the others are whole, start again"
            ) from error


def balanced(classes: Sequence[int], number: int) -> list[int]:
    """`number` labels, in the order of `classes`, the same number of each."""
    return [classes[index * len(classes) // number] for index in range(number)]


def _is_whole(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(-len(END_OF_PNG), 2)
            return file.read() == END_OF_PNG
    except OSError:  # not there, or shorter
        return False


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
