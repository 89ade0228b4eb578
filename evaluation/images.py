"""Generates numbered images for evaluation; `--evaluate_gen` runs this (paper, 5.2)."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from evaluation.gallery import Gallery
from evaluation.score import Scorer
from models.fractalgen import FractalGen
from models.hub.classes import class_title
from models.sampling.generate import is_out_of_memory
from models.sampling.options import SamplingOptions
from models.sampling.precision import sampling_dtype
from util import dist
from util.data.decode import to_mode
from util.dist import World
from util.errors import UserError
from util.pixels import Alphabet, make_sheet
from util.run.meters import PeakMemory

# arguments of a model, and sampling options, that decide no image
OF_TRAINING = ("label_drop_prob", "attn_dropout", "proj_dropout", "r_weight", "grad_checkpointing")
OF_COMPUTING = ("chunk", "compiled", "watch_levels", "amp")
SHEET_PIXELS = 96  # the least width of an image on a sheet for a person


@torch.no_grad()
def evaluate(
    model: FractalGen,
    folder: Path,
    options: SamplingOptions,
    *,
    num_images: int,
    batch_size: int,
    seed: int,
    world: World,
    classes: Sequence[int] | None = None,
    scorer: Scorer | None = None,
    run: dict | None = None,
    step: int = 0,
    progress_bar: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, float | None]:
    """Writes `folder`/00000.png, 00001.png, …, `num_images` of them; images that are there are not sampled
    again. What is no image of 8 bits is written as arrays (*shape, C) of values, in 00000.npy, 00001.npy, ….

    Image i depends only on (weights, options, seed, i), whichever process or job samples it
    (evaluation/gallery.py).

    classes  the same number of images of each, in this order; default: all
    scorer   scores the images, in `folder`/metrics.json and beside the folder for TensorBoard; not for arrays
    run      settings, versions and commit of this run (util.flags.provenance), for manifest and scores
    step     of the training, for the scores
    say      called with a line where memory ran out, which says what was done about it

    Returns the number of images, how many of them this job sampled, its seconds an image, the largest memory
    of a process, and the scores. Raises UserError where the folder was begun with other weights or settings.
    """
    is_image = model.alphabet.is_image(model.image_shape)
    if scorer is not None and not is_image:
        raise UserError(
            "only images of 8 bits have scores, and this model draws none; leave out --fid_stats and --sweep"
        )
    classes = list(range(model.class_num)) if classes is None else classes
    of_each = classes or [0]
    labels = [of_each[i * len(of_each) // num_images] for i in range(num_images)]
    arguments = {**model.arguments, **asdict(options)}
    decisive = {key: arguments[key] for key in arguments if key not in OF_TRAINING + OF_COMPUTING}
    device, precision = model.fake_latent.device, sampling_dtype(model, options.amp)
    decisive |= {"precision": str(precision), "seed": seed, "classes": classes}
    decisive |= {"weights_sha256": fingerprint(model.state_dict())}
    notes = {"chunk": options.chunk, "compiled": options.compiled, "begun_by": run}
    unit = min(batch_size, -(-num_images // world.size))
    gallery = Gallery(folder, num_images, decisive, notes, unit, "png" if is_image else "npy")
    drawer = Drawer(model, labels, options, seed, say)
    began, peak = time.perf_counter(), PeakMemory(device)
    shown = None if progress_bar and world.is_main else True  # None: a bar only on a terminal
    there = num_images - len(gallery.missing(range(num_images)))
    with tqdm(total=num_images, initial=there, desc="images", unit="image", disable=shown) as bar:
        watch = lambda there: bar.update(there - bar.n)  # noqa: E731
        drawn = gallery.fill(drawer, batch_size, world.rank / world.size, watch)
    dist.barrier()
    gallery.close()
    drawn, elapsed = sum(dist.gather(drawn)), time.perf_counter() - began
    figures = {
        "num_images": num_images,
        "num_drawn": drawn,
        "secs_per_image": elapsed / drawn if drawn else None,
        "peak_gib": max(dist.gather(peak.gib())),
    }
    if scorer is not None:
        path, events = folder / "metrics.json", folder.parent / "scores"
        figures |= scorer.publish(folder, path, events, run, step)
    return figures


class Drawer:
    """Samples images by their numbers. Where memory runs out, it halves --chunk from then on."""

    def __init__(self, model, labels: Sequence[int], options: SamplingOptions, seed: int, say):
        self.model, self.labels, self.options, self.seed = model, labels, options, seed
        self.say = say

    def __call__(self, indices: Sequence[int]) -> Sequence[Image.Image | np.ndarray]:
        while True:
            try:
                labels = [self.labels[i] for i in indices]
                return draw(self.model, labels, indices, self.options, self.seed)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            chunk = self.options.chunk or 2 * len(indices)
            if chunk == 1:
                raise UserError(
                    f"out of memory drawing {len(indices)} images, even with --chunk 1; "
                    "give a smaller --gen_bsz"
                )
            self.options = replace(self.options, chunk=chunk // 2)
            self.say(f"out of memory: from now on with --chunk {chunk // 2}")
            if self.model.fake_latent.device.type != "cpu":
                torch.accelerator.empty_cache()


def draw(
    model: FractalGen,
    labels: Sequence[int],
    indices: Sequence[int],
    options: SamplingOptions,
    seed: int,
) -> Sequence[Image.Image | np.ndarray]:
    """Images number `indices` of `seed` for class `labels`, or unconditional ones, as `generate` has them."""
    return model.generate(
        labels if model.class_num else None,
        num_images=len(indices),
        seed=seed,
        indices=indices,
        progress_bar=False,
        **asdict(options),
    )


def draw_sheet(
    model: FractalGen, class_names: Sequence[str], title: str, options: SamplingOptions, seed: int
) -> Image.Image:
    """Samples 16 images for a person to look at, of classes that are spread over all of the model's.

    Each is enlarged to at least SHEET_PIXELS and has the name of its class, or its number where there are no
    names. `title` is written above them. `as_grey` draws what is no image.
    """
    labels = [i * max(model.class_num, 1) // 16 for i in range(16)]
    drawn = draw(model, labels, range(16), options, seed)
    images = [to_mode(x) if isinstance(x, Image.Image) else as_grey(x, model.alphabet) for x in drawn]
    captions = [class_title(label, class_names) for label in labels] if model.class_num else ()
    # A strip is at least a third as high as SHEET_PIXELS.
    zoom = -(-SHEET_PIXELS // min(images[0].width, 3 * images[0].height))
    return make_sheet(images, 4, zoom=zoom, captions=captions, title=title)


def as_grey(values: np.ndarray, alphabet: Alphabet) -> Image.Image:
    """Draws values (*shape, C) as grey cells: channels below each other, slices of three axes in a row."""
    grid = values.reshape((1,) * (4 - values.ndim) + values.shape)  # (D, H, W, C)
    depth, height, width, channels = grid.shape
    cells = alphabet.to_bytes(grid.transpose(3, 1, 0, 2).reshape(channels * height, depth * width))
    return Image.fromarray(cells.repeat(max(1, width // (8 * len(cells))), axis=0))  # no strip is too thin


def fingerprint(weights: dict[str, Tensor]) -> str:
    """The SHA-256, in hexadecimal, of names, dtypes, shapes and values, independent of file and device."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
