"""Checks a data set, or packs it so that it can be read without decoding (util/data/packed.py).

    python -m util.data.tool check DATA                    lists images that cannot be read; status 1 if any
    python -m util.data.tool pack DATA OUT --img_size 64   then train with --data_path OUT --img_size 64
    python -m util.data.tool pack DATA OUT --img_size 64 --shard_gb 1           in files of up to 1 GB

DATA is what --data_path takes. --img_size is 64 for squares, or cells along each axis: 28x20, 64x for one
axis, 8x16x16. If packing was interrupted, run the same command again: it continues from there.
"""

import argparse
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from util.data.loader import ImageDataset, find_bad, make_loader, open_split
from util.data.packed import HASHES, IMAGES, LABELS, MANIFEST, NAMES, PROGRESS, part, parts, settings_of
from util.data.source import Source, cells_of, describe
from util.dist import World
from util.errors import UserError, naming
from util.files import atomic_write, check_writable, remove_stale, sha256, write_json, writing
from util.flags import Parser, from_flags
from util.pixels import RGB, VALUE_KINDS, Alphabet, parse_shape, shape_name
from util.run.meters import printable

BATCH = 256  # images between two updates of progress.json


def check(root: str, splits: list[str], num_workers: int, wanted: tuple | None) -> int:
    """Prints every error. Returns the exit status: 1 if there are any, else 0.

    `wanted` are the shape and the alphabet to read. None: those of the data, up to the value 65,535.
    """
    errors = 0
    for split in splits:
        try:
            source = open_split(root, split)
            of_data = source.shape or (8, 8), source.alphabet or RGB
            bad = find_bad(ImageDataset(source, *(wanted or of_data), seed=0), World(), num_workers)
            counts = f"{len(source.classes)} classes, {len(source)} images, {len(bad)} bad"
            summary = f"{split}: {source.kind}, {counts}"
        except UserError as error:
            bad, summary = [str(error)], f"{split}: cannot be used"
        print(*map(printable, [*bad, summary]), sep="\n")
        errors += len(bad)
    return 1 if errors else 0


def pack(
    source: Source, folder: Path, shape: tuple[int, ...], alphabet: Alphabet, num_workers: int,
    shard_gb: float | None = None,
) -> dict[int, str]:  # fmt: skip
    """Packs a split into `folder`, or continues to. Returns the errors of the bad images by their number.

    shard_gb  the size of a shard, at most; None: no shards

    Raises UserError if the folder holds a pack of other images, or cannot be written.
    """
    source.check(shape, alphabet)
    settings = {
        "shape": list(shape), "alphabet": list(cells_of(alphabet)), "can_mirror": source.can_mirror,
        "kind": source.kind, "classes": source.classes, "pictures": len(source),
        "shard_images": shard_gb and max(1, int(shard_gb * 1e9 / image_bytes(shape, alphabet))),
    }  # fmt: skip
    with writing(folder, "; run the same command to go on"):
        progress = begin(folder, source, settings)
        if not (folder / MANIFEST).exists():
            write_images(source, folder, num_workers, progress)
            if settings["shard_images"]:
                shards = parts(len(source), settings["shard_images"])
                names = LABELS, *(part(IMAGES, number) for number, _ in shards)
                lines = [f"{sha256(folder / name)}  {name}\n" for name in names]
                with atomic_write(folder / HASHES) as temporary:
                    temporary.write_text("".join(lines), encoding="utf-8")
            write_json(folder / MANIFEST, {**settings, "bad": progress["bad"]})
        (folder / PROGRESS).unlink(missing_ok=True)
        return progress["bad"]


def image_bytes(shape: tuple[int, ...], alphabet: Alphabet) -> int:
    return math.prod(shape) * alphabet.channels * alphabet.stored.itemsize


def check_space(folder: Path, images: int, shape: tuple[int, ...], alphabet: Alphabet) -> None:
    """Makes `folder`. Raises UserError if so many images of this shape and alphabet do not fit on its disk.

    What an earlier run has packed counts as free.
    """
    check_writable(folder / MANIFEST, str(folder))
    packed = sum(path.stat().st_size for path in folder.glob("*/pictures*.npy"))
    needed = images * image_bytes(shape, alphabet)
    free = shutil.disk_usage(folder).free + packed
    if needed > free:
        raise UserError(
            f"--img_size {shape_name(shape)}: {images} images need {needed / 2**30:,.1f} GiB, "
            f"{folder} has {free / 2**30:,.1f}; give a smaller size or another folder"
        )


def begin(folder: Path, source: Source, settings: dict) -> dict:
    """Writes what is known before an image is read, or finds out how far an earlier run came.

    Returns `settings` with the number of images that are "done" and the errors of the "bad" ones.
    """
    shards = parts(len(source), settings["shard_images"])
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale(folder)
    found = next((folder / name for name in (MANIFEST, PROGRESS) if (folder / name).exists()), None)
    if found is None:
        ours = {LABELS, *(part(name, number) for name in (IMAGES, NAMES) for number, _ in shards)}
        if others := {path.name for path in folder.iterdir()} - ours:
            raise UserError(f"{folder}: holds other files ({min(others)}); give another folder to pack into")
        np.save(folder / LABELS, source.labels)
        alphabet = Alphabet(*settings["alphabet"])
        for number, images in shards:
            write_json(folder / part(NAMES, number), [source.name(i) for i in images])
            shape = (len(images), alphabet.channels, *settings["shape"])
            with open(folder / part(IMAGES, number), "wb") as file:
                header = {"descr": alphabet.stored.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
        progress = {**settings, "done": 0, "bad": {}}
        write_json(folder / PROGRESS, progress)
        return progress
    progress = settings_of(json.loads(found.read_text()))
    same = settings == {key: progress[key] for key in settings} and all(
        json.loads((folder / part(NAMES, number)).read_text()) == [source.name(i) for i in images]
        for number, images in shards
    )
    if not same or not np.array_equal(np.load(folder / LABELS), source.labels):
        raise UserError(
            f"{folder}: holds a pack of other images, classes or size; remove it or give another folder"
        )
    return {**progress, "bad": {int(number): reason for number, reason in progress["bad"].items()}}


def write_images(source: Source, folder: Path, num_workers: int, progress: dict) -> None:
    """Writes the images from number progress["done"] on. Notes each batch in `progress` and in its file."""
    dataset = ImageDataset(source, tuple(progress["shape"]), Alphabet(*progress["alphabet"]), seed=0)
    loader = make_loader(dataset, BATCH, World(), shuffled=False, num_workers=num_workers, pin_memory=False)
    loader.batch_sampler.start = progress["done"]
    shards, begun = parts(len(source), progress["shard_images"]), progress["done"]
    with tqdm(total=len(source), initial=begun, desc=folder.name, unit="image", disable=None) as bar:
        for values, _, indices in loader:
            first = int(indices[0]) // BATCH * BATCH
            rows = np.zeros((min(BATCH, len(source) - first), *values.shape[1:]), dataset.alphabet.stored)
            rows[indices - first] = values.numpy()  # a bad image stays black
            for number, images in shards:
                begin, end = max(first, images.start), min(first + len(rows), images.stop)
                if begin < end:
                    path = folder / part(IMAGES, number)
                    write_rows(path, begin - images.start, rows[begin - first : end - first])
            progress["done"] = first + len(rows)
            progress["bad"].update(loader.bad)
            write_json(folder / PROGRESS, progress)
            bar.update(progress["done"] - bar.n)
    progress["bad"].update(loader.bad)
    for number, images in shards:  # fills up with zeros where the last images are bad
        write_rows(folder / part(IMAGES, number), len(images), np.empty(0))


def write_rows(path: Path, row: int, rows: np.ndarray) -> None:
    """Writes rows of a npy file from number `row` on. Its last row ends the file."""
    with open(path, "r+b") as file:
        np.lib.format.read_magic(file)
        (count, *shape), _, dtype = np.lib.format.read_array_header_1_0(file)
        file.seek(row * math.prod(shape) * dtype.itemsize, os.SEEK_CUR)
        file.write(rows.data)
        if row + len(rows) == count:
            file.truncate()
        file.flush()
        os.fsync(file.fileno())


def main(argv: list[str] | None = None) -> int:
    parser = Parser("dataset_tool", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("check", "pack"))
    parser.add_argument("data", help="what --data_path takes")
    parser.add_argument("out", type=Path, nargs="?", help="folder of the pack")
    parser.add_argument(
        "--img_size", type=parse_shape, metavar="SIZE", help="cells along each axis, as the model has them"
    )
    parser.add_argument("--channels", type=int, default=3, help="values in a cell; default: 3")
    parser.add_argument("--num_values", type=int, default=256, help="each is less than this; default: 256")
    parser.add_argument("--value_kind", choices=VALUE_KINDS, default="ordinal", help="default: ordinal")
    parser.add_argument("--shard_gb", type=float, help="cut the pack into files of up to so many gigabytes")
    parser.add_argument("--splits", nargs="+", choices=("train", "val"), default=("train", "val"))
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes that read images")
    args = parser.parse_args(argv)
    packing = args.command == "pack"
    if packing != (args.out is not None) or packing > (args.img_size is not None):
        parser.error("pack needs DATA OUT --img_size; check takes no OUT")
    if args.num_workers < 0:
        parser.error(f"--num_workers {args.num_workers} must be at least 0")
    if args.shard_gb is not None and not 0 < args.shard_gb < math.inf:
        parser.error(f"--shard_gb {args.shard_gb} must be more than 0")
    with parser.one_line_errors(), naming({name: f"--{name}" for name in ("channels", "num_values")}):
        alphabet, shape = from_flags(Alphabet, args), args.img_size
        if shape is None and alphabet != RGB:
            raise UserError("--channels, --num_values and --value_kind need --img_size too")
        if not packing:
            return check(args.data, args.splits, args.num_workers, (shape, alphabet) if shape else None)
        sources = [(split, open_split(args.data, split)) for split in args.splits]
        check_space(args.out, sum(len(source) for _, source in sources), shape, alphabet)
        for split, source in sources:
            bad = pack(source, args.out / split, shape, alphabet, args.num_workers, args.shard_gb)
            print(f"{args.out / split}: {len(source)} images of {describe(shape, alphabet)}, {len(bad)} bad")
    return 0


if __name__ == "__main__":
    sys.exit(main())
