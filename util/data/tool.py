"""Checks a data set, or packs it into a cache that is read without decoding (util/data/packed.py).

    python -m util.data.tool check DATA                     lists every image that cannot be read; status 1 if any
    python -m util.data.tool pack DATA OUT --img_size 64    then train with --data_path OUT --img_size 64

DATA is what --data_path takes. Packing that was interrupted goes on where it was when run again.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from util.data.loader import ImageDataset, find_bad, make_loader, open_split
from util.data.packed import IMAGES, LABELS, MANIFEST, NAMES, PROGRESS
from util.data.source import Source
from util.dist import World
from util.errors import UserError
from util.files import write_json
from util.flags import Parser
from util.meters import printable

BATCH = 256  # images between two notes of how far packing is


def check(root: Path, splits: list[str], num_workers: int) -> int:
    """Prints what is wrong. Returns the exit status: 1 where anything is."""
    wrong = 0
    for split in splits:
        try:
            source = open_split(root, split)
            bad = find_bad(source, World(), num_workers)
            summary = (
                f"{split}: {source.kind}, {len(source.classes)} classes, {len(source)} images, {len(bad)} bad"
            )
        except UserError as error:
            bad, summary = [str(error)], f"{split}: cannot be used"
        for line in [*bad, summary]:
            print(printable(line))
        wrong += len(bad)
    return 1 if wrong else 0


def pack(source: Source, folder: Path, size: int, num_workers: int) -> dict[int, str]:
    """Writes a split to `folder`, or the rest of it. Returns the bad images: number -> what is wrong.

    Raises UserError where the folder was begun from other images, or cannot be written.
    """
    settings = {"img_size": size, "kind": source.kind, "classes": source.classes, "pictures": len(source)}
    try:
        done, bad = begin(folder, source, settings)
        if not (folder / MANIFEST).exists():
            write_images(source, folder, size, num_workers, done, bad)
            write_json(folder / MANIFEST, {**settings, "bad": bad})
        (folder / PROGRESS).unlink(missing_ok=True)
        return bad
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); run the same command to go on"
        ) from error


def begin(folder: Path, source: Source, settings: dict) -> tuple[int, dict[int, str]]:
    """Writes what is known without reading an image, or reads how far a run before this one came: images done, the bad."""
    names = [source.name(i) for i in range(len(source))]
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.json.*.tmp"):  # of a run that was killed while it wrote
        stale.unlink()
    found = next((folder / name for name in (MANIFEST, PROGRESS) if (folder / name).exists()), None)
    if found is None:
        if others := {path.name for path in folder.iterdir()} - {LABELS, IMAGES, NAMES}:
            raise UserError(f"{folder}: holds other files ({min(others)}); give another folder to pack into")
        np.save(folder / LABELS, source.labels)
        write_json(folder / NAMES, names)
        with open(folder / IMAGES, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header(len(source), settings["img_size"]))
        write_json(folder / PROGRESS, {**settings, "done": 0, "bad": {}})
        return 0, {}
    note = json.loads(found.read_text())
    same = {key: note[key] for key in settings} == settings and json.loads(
        (folder / NAMES).read_text()
    ) == names
    if not same or not np.array_equal(np.load(folder / LABELS), source.labels):
        raise UserError(
            f"{folder}: holds a pack of other images, classes or size; remove it or give another folder"
        )
    return note.get("done", len(source)), {int(number): reason for number, reason in note["bad"].items()}


def header(images: int, size: int) -> dict:
    return {"descr": "|u1", "fortran_order": False, "shape": (images, 3, size, size)}


def write_images(
    source: Source, folder: Path, size: int, num_workers: int, done: int, bad: dict[int, str]
) -> None:
    """Images `done` and after it, in order, and after each batch how far it came. Adds to `bad`."""
    dataset = ImageDataset(source, size, seed=0)
    loader = make_loader(dataset, BATCH, World(), shuffled=False, num_workers=num_workers, pin_memory=False)
    loader.batch_sampler.start = done
    progress = json.loads((folder / PROGRESS).read_text())
    bytes_each = 3 * size * size
    with (
        open(folder / IMAGES, "r+b") as file,
        tqdm(total=len(source), initial=done, desc=folder.name, unit="image", disable=None) as bar,
    ):
        np.lib.format.read_magic(file), np.lib.format.read_array_header_1_0(file)
        start = file.tell()
        for levels, _, indices in loader:
            first = int(indices[0]) // BATCH * BATCH
            rows = np.zeros(
                (min(BATCH, len(source) - first), bytes_each), np.uint8
            )  # a bad image stays black
            rows[indices - first] = levels.flatten(1).numpy()
            file.seek(start + first * bytes_each)
            file.write(rows.data)
            file.flush()
            os.fsync(file.fileno())
            bad.update(loader.bad)
            progress |= {"done": first + len(rows), "bad": bad}
            write_json(folder / PROGRESS, progress)
            bar.update(progress["done"] - bar.n)
        file.truncate(start + len(source) * bytes_each)  # where the last images are bad, zeros up to the end
        bad.update(loader.bad)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("dataset_tool", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("check", "pack"))
    parser.add_argument("data", type=Path, help="what --data_path takes")
    parser.add_argument("out", type=Path, nargs="?", help="folder of the pack")
    parser.add_argument("--img_size", type=int, help="side of the packed images, as the model's --img_size")
    parser.add_argument("--splits", nargs="+", choices=("train", "val"), default=("train", "val"))
    parser.add_argument("--num_workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    packing = args.command == "pack"
    if packing != (args.out is not None) or packing != (args.img_size is not None):
        parser.error("pack needs DATA OUT --img_size; check takes DATA alone")
    if args.num_workers < 0 or (packing and args.img_size < 1):
        parser.error(f"--num_workers {args.num_workers} must be at least 0, --img_size at least 1")
    try:
        if not packing:
            return check(args.data, args.splits, args.num_workers)
        for split, source in [(split, open_split(args.data, split)) for split in args.splits]:
            bad = pack(source, args.out / split, args.img_size, args.num_workers)
            print(f"{args.out / split}: {len(source)} images of {args.img_size} px, {len(bad)} of them bad")
    except UserError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
