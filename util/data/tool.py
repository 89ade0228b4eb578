"""Checks a data set, or packs it so that it can be read without decoding (util/data/packed.py).

    python -m util.data.tool check DATA                    lists images that cannot be read; status 1 if any
    python -m util.data.tool pack DATA OUT --img_size 64   then train with --data_path OUT --img_size 64

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
from util.data.packed import IMAGES, LABELS, MANIFEST, NAMES, PROGRESS, settings_of
from util.data.source import Source, cells_of, describe
from util.dist import World
from util.errors import UserError, naming
from util.files import check_writable, remove_stale, write_json, writing
from util.flags import Parser, from_flags
from util.pixels import RGB, VALUE_KINDS, Alphabet, parse_shape, shape_name
from util.run.meters import printable

BATCH = 256  # images between two updates of progress.json


def check(root: Path, splits: list[str], num_workers: int, wanted: tuple | None) -> int:
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
    source: Source, folder: Path, shape: tuple[int, ...], alphabet: Alphabet, num_workers: int
) -> dict[int, str]:
    """Packs a split into `folder`, or continues to. Returns the errors of the bad images by their number.

    Raises UserError if the folder holds a pack of other images, or cannot be written.
    """
    source.check(shape, alphabet)
    settings = {
        "shape": list(shape), "alphabet": list(cells_of(alphabet)), "can_mirror": source.can_mirror,
        "kind": source.kind, "classes": source.classes, "pictures": len(source),
    }  # fmt: skip
    with writing(folder, "; run the same command to go on"):
        progress = begin(folder, source, settings)
        if not (folder / MANIFEST).exists():
            write_images(source, folder, num_workers, progress)
            write_json(folder / MANIFEST, {**settings, "bad": progress["bad"]})
        (folder / PROGRESS).unlink(missing_ok=True)
        return progress["bad"]


def check_space(folder: Path, images: int, shape: tuple[int, ...], alphabet: Alphabet) -> None:
    """Makes `folder`. Raises UserError if so many images of this shape and alphabet do not fit on its disk.

    What an earlier run has packed counts as free.
    """
    check_writable(folder / MANIFEST, str(folder))
    packed = sum(path.stat().st_size for path in folder.glob(f"*/{IMAGES}"))
    needed = images * math.prod(shape) * alphabet.channels * alphabet.stored.itemsize
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
    names = [source.name(i) for i in range(len(source))]
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale(folder)
    found = next((folder / name for name in (MANIFEST, PROGRESS) if (folder / name).exists()), None)
    if found is None:
        if others := {path.name for path in folder.iterdir()} - {LABELS, IMAGES, NAMES}:
            raise UserError(f"{folder}: holds other files ({min(others)}); give another folder to pack into")
        np.save(folder / LABELS, source.labels)
        write_json(folder / NAMES, names)
        alphabet = Alphabet(*settings["alphabet"])
        shape = (len(source), alphabet.channels, *settings["shape"])
        with open(folder / IMAGES, "wb") as file:
            header = {"descr": alphabet.stored.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        progress = {**settings, "done": 0, "bad": {}}
        write_json(folder / PROGRESS, progress)
        return progress
    progress, packed = settings_of(json.loads(found.read_text())), json.loads((folder / NAMES).read_text())
    same = packed == names and settings == {key: progress[key] for key in settings}
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
    with (
        open(folder / IMAGES, "r+b") as file,
        tqdm(
            total=len(source), initial=progress["done"], desc=folder.name, unit="image", disable=None
        ) as bar,
    ):
        np.lib.format.read_magic(file)
        (_, *shape), _, dtype = np.lib.format.read_array_header_1_0(file)
        start, image_bytes = file.tell(), math.prod(shape) * dtype.itemsize
        for values, _, indices in loader:
            first = int(indices[0]) // BATCH * BATCH
            count = min(BATCH, len(source) - first)
            rows = np.zeros((count, *shape), dtype)  # a bad image stays black
            rows[indices - first] = values.numpy()
            file.seek(start + first * image_bytes)
            file.write(rows.data)
            file.flush()
            os.fsync(file.fileno())
            progress["done"] = first + count
            progress["bad"].update(loader.bad)
            write_json(folder / PROGRESS, progress)
            bar.update(progress["done"] - bar.n)
        file.truncate(start + len(source) * image_bytes)  # fills up with zeros if the last images are bad
        progress["bad"].update(loader.bad)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("dataset_tool", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("check", "pack"))
    parser.add_argument("data", type=Path, help="what --data_path takes")
    parser.add_argument("out", type=Path, nargs="?", help="folder of the pack")
    parser.add_argument(
        "--img_size", type=parse_shape, metavar="SIZE", help="cells along each axis, as the model has them"
    )
    parser.add_argument("--channels", type=int, default=3, help="values in a cell; default: 3")
    parser.add_argument("--num_values", type=int, default=256, help="each is less than this; default: 256")
    parser.add_argument("--value_kind", choices=VALUE_KINDS, default="ordinal", help="default: ordinal")
    parser.add_argument("--splits", nargs="+", choices=("train", "val"), default=("train", "val"))
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes that read images")
    args = parser.parse_args(argv)
    packing = args.command == "pack"
    if packing != (args.out is not None) or packing > (args.img_size is not None):
        parser.error("pack needs DATA OUT --img_size; check takes no OUT")
    if args.num_workers < 0:
        parser.error(f"--num_workers {args.num_workers} must be at least 0")
    with parser.one_line_errors(), naming({name: f"--{name}" for name in ("channels", "num_values")}):
        alphabet, shape = from_flags(Alphabet, args), args.img_size
        if shape is None and alphabet != RGB:
            raise UserError("--channels, --num_values and --value_kind need --img_size too")
        if not packing:
            return check(args.data, args.splits, args.num_workers, (shape, alphabet) if shape else None)
        sources = [(split, open_split(args.data, split)) for split in args.splits]
        check_space(args.out, sum(len(source) for _, source in sources), shape, alphabet)
        for split, source in sources:
            bad = pack(source, args.out / split, shape, alphabet, args.num_workers)
            print(f"{args.out / split}: {len(source)} images of {describe(shape, alphabet)}, {len(bad)} bad")
    return 0


if __name__ == "__main__":
    sys.exit(main())
