"""Compresses images with a model, without loss, and decompresses them.

    python demo/codec.py encode FILE… -o images.fractal   images, arrays (.npy, .npz), IDX files, of any size
    python demo/codec.py decode images.fractal -o FOLDER  writes PNG files, or one .npy file if -o names one
    python demo/codec.py stat images.fractal              says what is in it, and what is needed to decode it

Decoding needs the same model, kind of processor and version of torch as encoding; see docs/codec.md. Until an
archive has been decoded, keep the originals.
"""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path

import numpy as np
import torch
from common import add_model_flags, check_output, make_parser, one_or_list, save_png, whole_number
from PIL import Image
from torch import Tensor

from models.hub.zoo import load
from models.likelihood.codec.archive import Archive, join
from util.data.arrays import read_values
from util.data.idx import read_idx
from util.errors import UserError, naming, one_line, reading
from util.files import atomic_write, check_writable
from util.flags import Parser
from util.inputs import open_image, to_exact_batch
from util.pixels import IMAGE_MODES, Alphabet, in_words

FLAGS = {"class_labels": "--label", "num_inference_steps": "--num_iter", "seed": "--seed", "only": "--only"}


def get_parser() -> Parser:
    parser = make_parser("codec.py", __doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    encode, decode, stat = (actions.add_parser(name) for name in ("encode", "decode", "stat"))
    for action in (encode, decode, stat):
        action.add_argument("files", type=Path, nargs="+", metavar="FILE")
    for action in (encode, decode):
        add_model_flags(action)
        action.add_argument("-o", "--output", type=Path, required=True)
    encode.add_argument("--label", help="number or name of the class of all images; default: unconditional")
    encode.add_argument(
        "--num_iter", type=int, nargs="+", help="steps: one number, or one for each level above the pixel"
    )
    encode.add_argument("--seed", type=int, default=0, help="of the orders of MAR levels")
    encode.add_argument(
        "--batch", type=whole_number(1), default=64, help="images, or tiles of them, that are coded together"
    )
    decode.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers of the images, from 0 on")
    decode.add_argument(
        "--force", action="store_true", help="try although the file is damaged, or the machine another one"
    )
    return parser


def read_file(path: Path, alphabet: Alphabet, axes: int) -> tuple[Tensor, str]:
    """Reads the values (N, C, *S) of a file, and the name of its image, "" for an array of several.

    Raises UserError for a file whose values cannot be kept exactly.
    """
    if path.suffix in (".npy", ".npz"):
        return exact(path, np.asarray(read_values(path)[:]), alphabet, axes), ""
    if path.name.removesuffix(".gz").endswith("idx3-ubyte"):
        samples = np.asarray(read_idx(path, 3)[:])
        values = alphabet.from_bytes(samples)
        if (alphabet.to_bytes(values) != samples).any():
            raise UserError(f"{path}: has other values than the model's {alphabet.num_values}")
        return exact(path, values, alphabet, axes), ""
    if not alphabet.is_image((1,) * axes):
        raise UserError(f"{path}: this model has no images; give its arrays as .npy")
    _, line = open_image(path, IMAGE_MODES[alphabet.channels])
    with reading(path, "cannot be read as an image"), Image.open(path) as file:
        if line:
            raise UserError(f"{line.removeprefix(f'{path}: ')}; convert it first")
        return to_exact_batch(file, axes, alphabet), path.stem


def exact(path: Path, values: np.ndarray, alphabet: Alphabet, axes: int) -> Tensor:
    """The values (N, *S, C) of a file as `to_exact_batch`. One channel may lack its axis."""
    values = values[..., None] if alphabet.channels == 1 and values.ndim == axes + 1 else values
    if values.ndim != axes + 2:
        raise UserError(f"{path}: has shape {values.shape}; it must be (N, *sides, channels)")
    with reading(path, "cannot be used"):
        return to_exact_batch(values, axes, alphabet)


def encode(args: argparse.Namespace) -> None:
    check_output("--output", args.output, ".fractal")
    model = load(args.model, args.device)
    by_shape: dict[tuple[int, ...], list[tuple[Tensor, str]]] = {}
    for path in args.files:
        values, name = read_file(path, model.alphabet, len(model.image_shape))
        by_shape.setdefault(values.shape[1:], []).append((values, name))
    archives, names, start = [], [], time.perf_counter()
    for group in by_shape.values():
        options = dict(num_inference_steps=one_or_list(args.num_iter), seed=args.seed, batch_size=args.batch)
        with naming(FLAGS):
            archives += model.compress(torch.cat([values for values, _ in group]), args.label, **options)
        names += [name for values, name in group for _ in values]
    seconds = time.perf_counter() - start
    data = join(archives, names if any(names) else ())
    with atomic_write(args.output) as temporary:
        temporary.write_bytes(data)
    print(f"{args.output}: {described(Archive.from_bytes(data))}")
    print(f"{len(archives) / seconds:.1f} images/s")


def decode(args: argparse.Namespace) -> None:
    archives = [read_archive(path, args.force) for path in args.files]
    streams = [stream for archive in archives for stream in archive.streams]
    names = [name for archive in archives for name in archive.names or [""] * len(archive.streams)]
    numbers = range(len(streams)) if args.only is None else args.only
    if args.output.suffix == ".npy":
        check_output("--output", args.output, ".npy")
        if len({stream.header.shape for stream in streams}) > 1:
            raise UserError(f"--output {args.output}: images of several sizes are no array; name a folder")
    else:
        check_writable(args.output / "00000", f"--output {args.output}")
    model = load(args.model, args.device)
    is_image = model.alphabet.is_image(model.image_shape) and args.output.suffix != ".npy"
    start = time.perf_counter()
    with naming(FLAGS):
        options = dict(output_type="pil" if is_image else "np", force=args.force)
        images = model.decompress(archives, args.only, **options)
    seconds = time.perf_counter() - start
    found = {number: image for number, image in zip(numbers, images, strict=True) if image is not None}
    if args.output.suffix == ".npy":
        write_array(args.output, np.stack(list(found.values())) if found else np.zeros(0, np.uint8))
    else:
        for number, image in found.items():
            path = args.output / file_name(names[number], number)
            if is_image:
                save_png(path.with_name(f"{path.name}.png"), image)
            else:
                write_array(path.with_name(f"{path.name}.npy"), image)
    print(f"{args.output}: {len(found)} images, {len(images) / seconds:.1f} images/s")
    if lost := [number for number in numbers if number not in found]:
        which = ", ".join(map(str, lost[:9])) + ", …" * (len(lost) > 9)
        raise UserError(f"{len(lost)} of {len(images)} images have another CRC-32 than they had: {which}")


def write_array(path: Path, array: np.ndarray) -> None:
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


def file_name(name: str, number: int) -> str:
    """A file's name without its ending: the number, and what a file system takes of the image's name."""
    plain = "".join(letter if letter.isalnum() or letter in " -_." else "_" for letter in name)
    plain = plain.encode()[:100].decode(errors="ignore")
    return f"{number:05}-{plain}" if plain else f"{number:05}"


def read_archive(path: Path, force: bool = False) -> Archive:
    with reading(path, "cannot be read"):
        return Archive.from_bytes(path.read_bytes(), force)


def described(archive: Archive) -> str:
    """Says how many images an archive has, of how many bytes and bits per dimension."""
    streams, size = archive.streams, len(archive.to_bytes())
    dims = sum(prod(stream.header.shape) for stream in streams)
    coded = sum(stream.bits for stream in streams)
    sizes = ", ".join(dict.fromkeys(in_words(stream.header.shape[1:]) for stream in streams))
    return (
        f"{len(streams)} image{'s' * (len(streams) != 1)} of {sizes}, {size:,} bytes, "
        f"{8 * size / max(1, dims):.4f} bits/dim; the values alone {coded / max(1, dims):.4f}"
    )


def stat(args: argparse.Namespace) -> None:
    for path in args.files:
        archive = read_archive(path)
        print(f"{path}: {described(archive)}")
        for header in dict.fromkeys(stream.header for stream in archive.streams):
            print(f"  {', '.join(f'{name} {one_line(value)}' for name, value in asdict(header).items())}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.one_line_errors(OSError):
        {"encode": encode, "decode": decode, "stat": stat}[args.action](args)


if __name__ == "__main__":
    main()
