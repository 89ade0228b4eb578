"""How likely a model finds an image, pixel by pixel, and which class explains it best (paper, 5.1).

A surprising image is not an anomaly: a plain grey image can be more likely than any training image (Nalisnick
et al. 2019, arXiv 1810.09136).
Letters: B images, C channels, S an image's sides, K classes, O drawn orders, R rows.
"""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from models.generator import Steps
from models.likelihood.bits import LN2, draw_steps, evaluation_terms, is_exact
from models.noise import Noise
from models.patches import unpatchify
from models.pixelloss import LossTerm
from models.sampling.generate import eval_mode
from models.sampling.labels import Label, check_labels, labels_of_each
from models.sampling.options import steps_of_levels
from models.sampling.precision import check_finite
from util.errors import ArgumentError, UserError, real_number, whole_number
from util.inputs import to_value_batch
from util.pixels import RGB, Alphabet

MAX_PIXELS = 2**16  # evaluated together
OVERFLOW = "the likelihood is not finite: numbers overflow"
# How bits (B, levels above the pixel, C, *S) are summed.
REDUCTIONS = {
    "image": lambda bits: bits.flatten(1).sum(1), "pixel": lambda bits: bits.sum((1, 2)),
    "channel": lambda bits: bits.flatten(3).sum((1, 3)), "level": lambda bits: bits.flatten(2).sum(2),
}  # fmt: skip


class LogLikelihood(NamedTuple):
    """log2-likelihoods and their standard errors over the drawn orders: float64, on the host (paper, 5.1)."""

    bits: Tensor
    standard_error: Tensor


@torch.no_grad()
def log_likelihood(
    model,
    images,
    class_labels: Label | Sequence[Label] | Tensor | None = None,
    reduce: str = "image",
    *,
    num_orders: int = 4,
    num_inference_steps: Sequence[int] | None = None,
    seed: int = 0,
    progress_bar: bool = True,
) -> LogLikelihood:
    """log2 p(image), with or without its class: in bits, at most 0 (paper, 5.1).

    images               as `model.edit` takes them, of the model's shape
    class_labels         one for all images, or one for each, a number or a name; None: unconditional
    reduce               "image": (B,). "pixel": (B, *S), a map of where the bits go. "channel": (B, C), for
                         RGB R, G, B. "level": (B, levels above the pixel), by the softmax below each level:
                         first those of guiding pixels, 0 where a level has none, then the pixels' own
    num_orders           number of orders drawn for each image, if the model has a MAR level; the result is
                         their mean
    num_inference_steps  of each level, or one number for all, as in `generate`: the likelihood is that of
                         this sampler, without guidance
    seed                 of the orders: image i's are the same for every class and in every batch

    Where every level is AR the result is exact, log2 p(x) = sum of log2 p(pixel | all before it), and its
    standard error is 0. Otherwise it is log2 p(x | order), exact for each drawn order; its mean over orders
    is at most log2 p(x) (see `bits_by_term`). In a map, a guiding pixel's bits are spread evenly over its
    patch, so a map sums to the image's bits. Raises UserError for an argument out of range, and where
    likelihoods or weights are not finite.
    """
    if reduce not in tuple(REDUCTIONS):
        raise ArgumentError("reduce", f"{reduce!r} must be one of {', '.join(REDUCTIONS)}")
    images = model_images(model, images)
    labels = labels_of_each(model, class_labels, len(images))
    orders = num_orders, num_inference_steps, seed
    found = _by_order(model, images, labels, *orders, reduce, progress_bar)
    check_finite(model, found, OVERFLOW)
    if is_exact(model):
        error = torch.zeros_like(found[0])
    elif len(found) > 1:
        error = found.std(0) / math.sqrt(len(found))
    else:
        error = torch.full_like(found[0], math.nan)
    return LogLikelihood(found.mean(0), error)


@torch.no_grad()
def classify(
    model,
    images,
    classes: Sequence[Label] | None = None,
    *,
    prior: Sequence[float] | None = None,
    num_orders: int = 4,
    num_inference_steps: Sequence[int] | None = None,
    seed: int = 0,
    progress_bar: bool = True,
) -> Tensor:
    """p(class | image) by Bayes' rule (paper, 5.1): (B, K) float64 on the host; rows sum to 1.

    classes  those that are considered, numbers or names, in the order of the columns; default: all
    prior    their probabilities before the image is seen; default: equal

    The other arguments are those of `log_likelihood`; all classes get the same orders. p(x | class) is the
    mean of p(x | order, class). It takes one likelihood pass for each class and order. Raises UserError as
    `log_likelihood` does.
    """
    images = model_images(model, images)
    labels = range(model.class_num) if classes is None else check_labels(model, classes, "classes")
    if not labels:
        raise UserError("the model has no classes to choose from")
    weights = prior_of(prior, len(labels))
    logs = []
    for label in tqdm(labels, desc="classes", disable=not progress_bar):
        same, orders = [label] * len(images), (num_orders, num_inference_steps, seed)
        bits = _by_order(model, images, same, *orders, "image", False)
        logs.append((bits * LN2).logsumexp(0) - math.log(len(bits)))  # (B,), nats
    logs = torch.stack(logs, dim=1)
    check_finite(model, logs, OVERFLOW)
    return (logs + weights.log()).softmax(1)


def prior_of(prior: Sequence[float] | None, num_classes: int) -> Tensor:
    """The prior of `classify` as (K,) float64, equal where it is None. Raises UserError for what is none."""
    wanted = f"{num_classes} numbers from 0, one for each class, not all 0"
    prior = [1.0] * num_classes if prior is None else prior
    prior = prior.tolist() if hasattr(prior, "tolist") else prior
    if not isinstance(prior, Sequence) or len(prior) != num_classes:
        raise ArgumentError("prior", f"{prior} must be {wanted}")
    weights = [real_number("prior", share, 0, sys.float_info.max, f"one of {wanted}") for share in prior]
    if not any(weights):
        raise ArgumentError("prior", f"{prior} must be {wanted}")
    return torch.tensor(weights, dtype=torch.float64)


def pixels_together(alphabet: Alphabet, most: int) -> int:
    """How many pixels to evaluate together: `most` of RGB, and fewer where a pixel has more logits."""
    logits, of_rgb = (one.channels * one.num_values for one in (alphabet, RGB))
    return max(1, min(most, most * of_rgb // logits))


def model_images(model, images) -> Tensor:
    """Images as users give them -> normalised images (B, C, *S) of the model's shape, on its device."""
    values = to_value_batch(images, model.image_shape, model.alphabet)
    return model.alphabet.normalize(values.to(model.fake_latent.device, non_blocking=True))


def _by_order(
    model,
    images: Tensor,
    labels: Sequence[int] | None,
    num_orders: int,
    num_inference_steps: Sequence[int] | None,
    seed: int,
    reduce: str,
    progress_bar: bool,
) -> Tensor:
    """log2-likelihoods of normalised images for each drawn order: (O, B, …), float64 on the host."""
    num_orders = whole_number("num_orders", num_orders, 1)
    steps = steps_of_levels(model, num_inference_steps)
    num_orders = 1 if is_exact(model) else num_orders
    labels = torch.tensor(labels) if labels is not None else None
    together = pixels_together(model.alphabet, MAX_PIXELS) // math.prod(model.image_shape)
    parts = torch.arange(len(images)).split(max(1, together))
    passes = [(order, rows) for order in range(num_orders) for rows in parts]
    found = []
    with eval_mode(model):
        for order, rows in tqdm(passes, desc="likelihood", disable=not progress_bar):
            noise = model.noise(seed, (rows + order * 2**32).tolist())
            some = labels[rows] if labels is not None else None
            there = rows.to(images.device, non_blocking=True)
            found.append(-REDUCTIONS[reduce](_bits(model, images[there], some, noise, steps)))
    return torch.cat(found).unflatten(0, (num_orders, -1))


def _bits(model, images: Tensor, labels: Tensor | None, noise: Noise, num_iter_list: Sequence[int]) -> Tensor:
    """Bits of each head and dimension: (B, levels above the pixel, C, *S) float64, on the host."""
    num_levels = len(model.generators)
    maps = torch.zeros(num_levels, *images.shape, dtype=torch.float64)
    for term in terms_in_steps(model, images, labels, draw_steps(model, noise, num_iter_list)):
        level = term.level if term.level >= 0 else num_levels
        nll = term.nll.cpu().double()  # sync
        maps[level - 1] = spread(model, nll / (LN2 * math.prod(model.shapes[level])), level)
    return maps.transpose(0, 1)


def terms_in_steps(
    model, images: Tensor, labels: Tensor | None, steps: Sequence[Steps | None]
) -> list[LossTerm]:
    """The loss terms of normalised images (B, C, *S) in the sampler's `steps` (paper, 5.1).

    labels  (B,); None: unconditional
    """
    drop = torch.full((len(images),), labels is None)
    labels = torch.zeros(len(images), dtype=torch.long) if labels is None else labels
    return evaluation_terms(model, images, labels, drop, steps, round_guiding_pixel=True)


def spread(model, values: Tensor, level: int) -> Tensor:
    """Spreads a value (R, C) of each image of `level` over its pixels: (B, C, *S) (paper, 5.1)."""
    shape = model.shapes[level]
    found = values[(..., *[None] * len(shape))].expand(*values.shape, *shape)
    for generator in reversed(model.generators[:level]):
        spec = generator.spec
        patches = found.reshape(-1, spec.num_patches, spec.patch_dim)
        found = unpatchify(patches, spec.grid, spec.patch_size)
    return found
