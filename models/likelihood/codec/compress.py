"""Lossless compression: sampling with the random numbers replaced by a file (docs/codec.md).

An image takes as many bits as the unguided sampler needs luck to draw it, -log2 p(image | order), which is
what `model.log_likelihood` computes. Letters: B images, C channels, S an image's sides.
"""

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import metadata
from math import prod

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.likelihood.codec.archive import Archive, Header, Stream
from models.likelihood.codec.passes import Passes
from models.likelihood.codec.tiles import Tiles
from models.noise import MAX_SEED
from models.sampling.generate import converter
from models.sampling.labels import Label, labels_of_each
from models.sampling.options import check_steps, steps_of_levels
from models.sampling.precision import sampling_dtype
from util.errors import ArgumentError, UserError, one_line, whole_number
from util.inputs import to_exact_batch
from util.threads import cpu_name, num_threads

MAX_ROWS, MAX_PROBABILITIES = 1024, 2**27  # of a pass
MAX_TOTAL = 2**30  # values of the images that are decompressed in one call
# Environment variables by which Intel's libraries choose how they multiply.
KERNELS = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
TRAINING_ONLY = ("label_drop_prob", "attn_dropout", "proj_dropout", "r_weight", "grad_checkpointing")


@torch.no_grad()
def compress(
    model,
    images,
    class_labels: Label | Sequence[Label] | Tensor | None = None,
    *,
    num_inference_steps: int | Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress_bar: bool = True,
) -> list[bytes]:
    """Compresses images without loss: for each an archive of its own, which `decompress` reads.

    images               of one size, which may be another one than the model's: PIL, arrays (B, *S, C) or
                         tensors (B, C, *S) of integers, none of which the model's values would change
    class_labels         one for all images, or one for each, a number or a name; the file holds its number.
                         None: unconditional
    num_inference_steps  of each level, or one number for all, as in `generate`: with fewer steps, images of
                         a model with a MAR level are faster and larger
    seed                 of the orders of MAR levels
    batch_size           how many images, or tiles of them, go through the model together at most. To read one
                         image takes the time of as many

    `archive.join` makes one archive of the results. Raises UserError for an argument out of range, for images
    that would change, and where constriction is not installed.
    """
    values = to_exact_batch(images, len(model.image_shape), model.alphabet).cpu().numpy()
    values = values.astype(model.alphabet.stored)
    labels = labels_of_each(model, class_labels, len(values)) or [None] * len(values)
    most = min(whole_number("batch_size", batch_size, 1), max_rows(model))
    num_tiles = len(values) * Tiles(values.shape[2:], model.image_shape).count(0)
    header = Header(
        **environment(model),
        seed=whole_number("seed", seed, 0, MAX_SEED),
        steps=steps_of_levels(model, num_inference_steps),
        shape=values.shape[1:],
        rows=-(-num_tiles // -(-num_tiles // most)),
    )
    passes, coded = Passes(model, header), {}
    for index, image in enumerate(values):
        coded[index] = passes.image(labels[index], checksum(image))
        coded[index].values[:] = image
    every = list(passes.tiles.passes(coded, header.rows))
    for where in tqdm(reversed(every), "compressing", len(every), disable=not progress_bar):
        passes.run(*where, coded, decode=False)
    if any((one.values != image).any() for one, image in zip(coded.values(), values, strict=True)):
        raise UserError("the model cannot tell its values apart; its mean and std do not fit them")
    return [Archive([Stream(header, i, one.label, one.stack)]).to_bytes() for i, one in coded.items()]


@torch.no_grad()
def decompress(
    model,
    data: bytes | Archive | Sequence[bytes | Archive],
    only: Iterable[int] | None = None,
    *,
    output_type: str | None = None,
    force: bool = False,
    progress_bar: bool = True,
) -> list:
    """Decompresses archives: a list of images, each exactly as it was.

    data         one archive or several, as `compress` and `archive.join` return them, or as `Archive`
    only         the numbers of the images to read, among all; default: all
    output_type  of each image, as in `generate`
    force        also tries where the archive is damaged, or where the model may compute other probabilities
                 than when it compressed; an image whose CRC is wrong then is None

    It computes with as many threads as `compress` did. Raises UserError for what is no archive or is damaged,
    for one of another model, processor, dtype or version of torch, for an image whose CRC is wrong, and for
    images with more than MAX_TOTAL values.
    """
    parts = [data] if isinstance(data, bytes | bytearray | memoryview | Archive) else data
    archives = [one if isinstance(one, Archive) else Archive.from_bytes(one, force) for one in parts]
    streams = [stream for archive in archives for stream in archive.streams]
    only = range(len(streams)) if only is None else only
    only = [whole_number("only", number, 0, len(streams) - 1) for number in only]
    convert = converter(model, output_type)
    groups, total = group(streams, only), 0
    for number in dict.fromkeys(only):
        channels, *shape = streams[number].header.shape
        total += channels * prod(map(max, shape, model.image_shape))
    if total > MAX_TOTAL:
        raise ArgumentError("only", f"must name fewer images: they have {total:,} values, not {MAX_TOTAL:,}")
    here, found = environment(model), {}
    for header, numbers in groups:
        with num_threads(min(header.threads, max(os.cpu_count() or 1, torch.get_num_threads()))):
            check_header(model, header, {**here, "threads": torch.get_num_threads()}, force)
            passes = Passes(model, header)
            coded = {index: passes.image(streams[n].label, streams[n].data) for index, n in numbers.items()}
            count = sum(1 for _ in passes.tiles.passes(coded, header.rows))
            every = passes.tiles.passes(coded, header.rows)
            for where in tqdm(every, "decompressing", count, disable=not progress_bar):
                ended = any(one.has_ended for one in passes.run(*where, coded, decode=True))
                if ended and not force:
                    raise UserError("the archive is damaged: the stream of an image ends before the image")
        for index, number in numbers.items():
            if coded[index].stack == checksum(coded[index].values):
                values = torch.from_numpy(coded[index].values[None].astype(np.int32))
                (found[number],) = convert(model.alphabet.normalize(values))
            elif not force:
                raise UserError(
                    f"image {number} of the archive has another CRC-32 than it had: it is damaged, or the "
                    "model computed other probabilities when it compressed"
                )
    return [found.get(number) for number in only]


def group(streams: Sequence[Stream], numbers: Iterable[int]) -> list[tuple[Header, dict[int, int]]]:
    """Sorts the streams of these numbers into groups that go through the model together.

    Returns their header and, by the images' indices, their numbers. Streams of one header are one group,
    unless two of them have the same index, and so the same row.
    """
    copies, groups = Counter(), {}
    for number in dict.fromkeys(numbers):
        header, index = streams[number].header, streams[number].index
        groups.setdefault((header, copies[header, index]), {})[index] = number
        copies[header, index] += 1
    return [(header, members) for (header, _), members in groups.items()]


def max_rows(model) -> int:
    """The largest number of rows of a pass; at least 1."""
    return max(1, min(MAX_ROWS, MAX_PROBABILITIES // (model.num_dims * model.alphabet.num_values)))


def checksum(image: np.ndarray) -> bytes:
    """What a stack begins with, and what is left of it in the end: the CRC-32 of values (C, *S), and a 1.

    With the 1, a stack that nobody damaged always has more than one word (`CodedImage.has_ended`).
    """
    return zlib.crc32(np.ascontiguousarray(image)).to_bytes(4, "little") + b"\1"


def environment(model) -> dict[str, str | int]:
    """The fields of a header that must be the same to decompress: the model, the processor, the versions."""
    digest, device = hashlib.sha256(), model.fake_latent.device
    settings = {name: value for name, value in model.arguments.items() if name not in TRAINING_ONLY}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # sync
    if device.type == "cpu":
        chosen = [f"{name}={os.environ[name]}" for name in KERNELS if name in os.environ]
        processor = ", ".join([cpu_name(), torch.backends.cpu.get_cpu_capability(), *chosen])
    else:
        processor = torch.get_device_module(device).get_device_name(device)
    return {
        "model": digest.hexdigest()[:16],
        "device": f"{device.type}, {processor}",
        "dtype": str(sampling_dtype(model, "off")).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "constriction": metadata.version("constriction"),
    }


def check_header(model, header: Header, here: dict[str, str | int], force: bool) -> None:
    """Raises UserError unless the model can decompress what the header describes, and exactly so `here`."""
    if header.shape[0] != model.alphabet.channels or len(header.shape) != 1 + len(model.image_shape):
        raise UserError(f"the archive has images of shape {header.shape}, which the model cannot draw")
    if header.rows > max_rows(model):
        raise UserError(f"the archive needs {header.rows} rows; this model has at most {max_rows(model)}")
    check_steps(header.steps, len(model.generators))
    pairs = [(name, getattr(header, name), own) for name, own in here.items()]
    differences = [f"{name} {one_line(there)}, here {own}" for name, there, own in pairs if there != own]
    if differences and not force:
        raise UserError(f"the archive may not decompress to the same values here: {'; '.join(differences)}")
