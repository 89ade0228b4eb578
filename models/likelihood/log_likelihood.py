"""Reading images: how likely a model finds each pixel, and which class explains an image best.

Surprise is not anomaly: a plain grey image can be more likely than any of the training images (Nalisnick et al. 2019,
arXiv 1810.09136).
Letters: B images, H image side, C classes, S drawn orders, L patches an image, p patch side.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from models.generator import Steps
from models.likelihood.bits import LN2, draw_steps
from models.noise import Noise
from models.patches import unpatchify
from models.sampling.generate import check_labels, eval_mode, labels_of_each, validate_num_iters
from util.inputs import to_value_batch
from util.pixels import normalize

TOGETHER = 2**16  # pixels
REDUCTIONS = {
    "image": lambda bits: bits.sum((-1, -2, -3, -4)),
    "pixel": lambda bits: bits.sum((-3, -4)),
    "channel": lambda bits: bits.sum((-1, -2, -4)),
    "level": lambda bits: bits.sum((-1, -2, -3)),
}


class LogLikelihood(NamedTuple):
    """log2-likelihoods, and their standard errors over the drawn orders, alike in shape: float64, on the host."""

    bits: Tensor
    standard_error: Tensor


@torch.no_grad()
def log_likelihood(
    model,
    images,
    class_labels: int | Sequence[int] | Tensor | None = None,
    reduce: str = "image",
    *,
    num_orders: int = 4,
    num_inference_steps: Sequence[int] | None = None,
    seed: int = 0,
    progress_bar: bool = True,
) -> LogLikelihood:
    """log2 p(image), given its class or not: in bits, at most 0; its negative is the model's surprise.

    images               as `model.edit` takes them, of the model's size
    class_labels         one for all images, or one each; None: unconditional
    reduce               "image": (B,). "pixel": (B, H, H), a map of where the bits go. "channel": (B, 3), R, G, B.
                         "level": (B, levels above the pixel), by the softmax below each level: guiding pixels, 0 where a
                         level has none, and the pixels' own last
    num_orders           so many orders are drawn for each image, if the model has a MAR level, and their mean is given
    num_inference_steps  of each level, as in `generate`: what is read is the likelihood of that sampler, unguided
    seed                 of the orders: image i's are the same for whatever class, and whatever is read with it

    Exact where every level is AR: log2 p(x) = sum of log2 p(pixel | all before it); the standard error is then 0. Else it is
    log2 p(x | order), exact for each drawn order; its mean over orders is at most log2 p(x) (`bits_by_term` says why).
    In a map, a guiding pixel's bits are spread evenly over the patch whose mean it is: a map sums to the image's bits.
    Raises ValueError for what is out of range.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"unknown reduce {reduce!r}; one of {', '.join(REDUCTIONS)}")
    images = model_images(model, images)
    labels = labels_of_each(class_labels, model.class_num, len(images))
    if labels is not None:
        labels = torch.tensor(labels)
    read = _orders(
        model, images, labels, num_orders, num_inference_steps, seed, REDUCTIONS[reduce], progress_bar
    )
    deviation = read.std(0) / math.sqrt(len(read)) if len(read) > 1 else torch.full_like(read[0], math.nan)
    return LogLikelihood(read.mean(0), torch.zeros_like(read[0]) if _exact(model) else deviation)


@torch.no_grad()
def classify(
    model,
    images,
    classes: Sequence[int] | None = None,
    *,
    prior: Sequence[float] | None = None,
    num_orders: int = 4,
    num_inference_steps: Sequence[int] | None = None,
    seed: int = 0,
    progress_bar: bool = True,
) -> Tensor:
    """p(class | image) by Bayes' rule, from p(image | class) -> (B, C) float64 on the host; rows sum to 1.

    classes  which of them may be meant, in the order of the columns; default: all
    prior    their probabilities before the image is seen; default: equal
    others   as in `log_likelihood`; the same orders for every class. p(x | class) is the mean of p(x | order, class)

    An image is read once for each class and order. Raises ValueError for what is out of range.
    """
    images = model_images(model, images)
    labels = range(model.class_num) if classes is None else check_labels(classes, model.class_num)
    if not labels:
        raise ValueError("classify needs at least one class")
    weights = (
        torch.ones(len(labels), dtype=torch.float64)
        if prior is None
        else torch.tensor(prior, dtype=torch.float64)
    )
    if len(weights) != len(labels) or not (weights >= 0).all() or not weights.sum() > 0:
        raise ValueError(f"prior {prior} must be {len(labels)} numbers from 0, one for each class, not all 0")
    logs = []
    for label in tqdm(labels, desc="classes", disable=not progress_bar):
        same = torch.full((len(images),), label)
        bits = _orders(model, images, same, num_orders, num_inference_steps, seed, REDUCTIONS["image"], False)
        logs.append((bits * LN2).logsumexp(0) - math.log(len(bits)))  # (B,), nats
    return (torch.stack(logs, dim=1) + weights.log()).softmax(1)


def _exact(model) -> bool:
    """Whether no level draws an order."""
    one = Noise.of_images(0, [0], model.noise_sizes)
    return all(steps is None for steps in draw_steps(model, one, model.sampling_defaults.num_inference_steps))


def model_images(model, images) -> Tensor:
    levels = to_value_batch(images, model.img_size_list[0])
    return normalize(levels.to(model.fake_latent.device), dtype=model.generator.dtype)


def _orders(model, images, labels, num_orders, num_iter_list, seed, reduce, progress_bar: bool) -> Tensor:
    """Normalised images (B, 3, H, H), labels (B,) or None -> log2-likelihoods (S, B, …), float64 on the host."""
    if num_orders < 1:
        raise ValueError(f"num_orders {num_orders} must be at least 1")
    steps = model.sampling_defaults.num_inference_steps if num_iter_list is None else num_iter_list
    validate_num_iters(steps, len(model.generators))
    orders = 1 if _exact(model) else num_orders
    size = max(1, TOGETHER // model.img_size_list[0] ** 2)
    parts = torch.arange(len(images)).split(size)
    read = []
    with eval_mode(model), tqdm(total=orders * len(images), desc="reading", disable=not progress_bar) as bar:
        for order in range(orders):
            of_order = []
            for rows in parts:
                noise = Noise.of_images(seed, (rows + order * 2**32).tolist(), model.noise_sizes)
                of_order.append(
                    reduce(
                        -_bits(model, images[rows], None if labels is None else labels[rows], noise, steps)
                    )
                )
                bar.update(len(rows))
            read.append(torch.cat(of_order))
    return torch.stack(read)


def _bits(model, images: Tensor, labels: Tensor | None, noise: Noise, num_iter_list: Sequence[int]) -> Tensor:
    """What each head pays for each sub-pixel in the sampler's steps: (B, levels above the pixel, 3, H, H) float64, host."""
    maps = torch.zeros(len(model.generators), *images.shape, dtype=torch.float64)
    for term in read_in_steps(model, images, labels, draw_steps(model, noise, num_iter_list)):
        level = len(model.generators) if term.name == "rgb" else int(term.name.removeprefix("guiding"))
        side = model.img_size_list[level]
        maps[level - 1] = spread(model, term.nll.cpu().double() / (LN2 * side**2), level)
    return maps.transpose(0, 1)


def read_in_steps(model, images: Tensor, labels: Tensor | None, steps: Sequence[Steps | None]) -> list:
    """Normalised images (B, 3, H, H), their labels (B,) or None -> the terms of the loss as the sampler pays in `steps`."""
    drop = torch.full((len(images),), labels is None, device=images.device)
    labels = torch.zeros(len(images), dtype=torch.long) if labels is None else labels
    masks = [one and one.to(images.device) for one in steps]
    settings = dict(masks=masks, label_drop=drop, train=False, dither=0.0, as_drawn=True, return_terms=True)
    _, terms = model(images, labels.to(images.device), **settings)
    return terms


def spread(model, values: Tensor, level: int) -> Tensor:
    """Values (R, 3) of the images of `level`, one after the other -> (B, 3, H, H), each all over its image's pixels."""
    side = model.img_size_list[level]
    found = values[:, :, None, None].expand(-1, -1, side, side)
    for generator in reversed(model.generators[:level]):
        spec = generator.spec
        found = unpatchify(found.reshape(-1, spec.num_patches, spec.patch_dim), spec.patch_size)
    return found
