"""Bits of each image from the terms of the loss: by head, channel and level (paper, 5.1).

Letters: B images, C channels, L patches of an image, R rows. `model` is a FractalGen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.generator import Generator, Mask, Steps
from models.noise import Noise
from models.pixelloss import LossTerm

QUARTERS = 4
LN2 = math.log(2)


def draw_steps(model, noise: Noise, num_iter_list: Sequence[int]) -> list[Steps | None]:
    """The steps in which the sampler decides the patches of all levels (paper, 5.1).

    `model(images, labels, masks=…)` takes them to follow the sampler.
    """
    steps = []
    for generator, num_iter in zip(model.generators, num_iter_list, strict=True):
        steps.append(generator.draw_steps(noise, num_iter))
        noise = noise.rows(torch.arange(noise.order_uniforms.numel()))
    return steps


def evaluation_terms(model, images: Tensor, labels: Tensor, label_drop: Tensor, masks, **options):
    """The loss terms of normalised images (B, C, *S) in evaluation, under masks or Steps (paper, 5.1).

    labels, label_drop  (B,): the classes, and whether each image is measured without its class
    options             of the model's call
    """
    device = images.device
    masks = [mask.to(device) if mask is not None else None for mask in masks]
    options |= dict(masks=masks, train=False, dither=0.0, return_terms=True)
    labels, label_drop = (x.to(device, non_blocking=True) for x in (labels, label_drop))
    return model(images, labels, label_drop=label_drop, **options)[1]


def is_exact(model) -> bool:
    """Whether no level samples in a random order: one pass then gives the exact likelihood (paper, 5.1)."""
    return all(generator.exact_likelihood for generator in model.generators)


def meaning(model, in_steps: bool, guided: bool) -> str:
    """Says in words, for a report, what the bits of `bits_by_term` are for this model (paper, 5.1)."""
    if is_exact(model):
        return "the negative log-likelihood, exactly"
    what = (
        "the sampler's own steps, exactly for each drawn order"
        if in_steps
        else "the mean over all orders, one patch a step"
    )
    return (
        f"an upper bound on the negative log-likelihood: {what}" + ", guiding pixels' bits included" * guided
    )


@dataclass(frozen=True)
class Rows:
    """The images that a level receives, all (R,) on the host: whole images or patches (paper, 5.1).

    parent   the number of the image of the level above that the patch belongs to
    owner    the number of the whole image
    share    how many patches of its parent it stands for; weight: how many of the whole image
    quarter  0..3: which quarter of the parent's patches was known when it was decided
    """

    parent: Tensor
    owner: Tensor
    share: Tensor
    weight: Tensor
    quarter: Tensor


def trace_rows(model, masks: Sequence[Mask | Steps | None], num_images: int) -> list[Rows]:
    """The rows of every level under these masks; those of the head come last (paper, 5.1)."""
    own, ones = torch.arange(num_images), torch.ones(num_images, dtype=torch.float64)
    rows = [Rows(own, own, ones, ones, torch.zeros_like(own))]
    for generator, mask in zip(model.generators, masks, strict=True):
        rows.append(_rows_below(generator, mask, rows[-1]))
    return rows


def _rows_below(generator: Generator, mask: Mask | Steps | None, above: Rows) -> Rows:
    length, n = generator.spec.num_patches, len(above.owner)
    if isinstance(mask, Mask):
        numbers, masked = mask.rows.cpu(), mask.masked.cpu().sum(1)  # sync
        parent = numbers // length
        share, known = (length / masked.double())[parent], (length - masked)[parent]
    else:
        plan = mask.plan if mask is not None else [(begin, end) for begin, end, _ in generator.plan(length)]
        known = torch.cat([torch.full((end - begin,), begin) for begin, end in plan]).repeat(n, 1)
        if mask is not None:
            known = known.scatter(1, mask.order.cpu(), known)  # sync
        parent, known = torch.arange(n).repeat_interleave(length), known.flatten()
        share = torch.ones(n * length, dtype=torch.float64)
    return Rows(parent, above.owner[parent], share, above.weight[parent] * share, QUARTERS * known // length)


def bits_by_term(terms: Sequence[LossTerm], rows: Sequence[Rows]) -> dict[str, Tensor]:
    """The terms of one evaluation pass and its rows -> bits (B, C) float64 of the channels, by term.

    An AR level's rows count once, and so do those of a MAR level that follows the sampler's Steps. The sum is
    then -log2 p(image | the drawn orders), exactly as the unguided sampler draws. At a MAR level with a Mask
    of m of L patches, each masked patch counts L / m times. With m uniform on 1..L this is an unbiased
    estimate of the mean negative log-likelihood over all orders, one patch a step (order-agnostic
    autoregression, Hoogeboom et al. 2021, arXiv 2110.02037, eq. 3), at each level and so for the product of
    levels. p(image) is the mean of p(image | orders), so by Jensen's inequality the expectation of either
    number is at least -log2 p(image).

    Guiding pixels g are a function of the image x, and the model draws both: p(x) >= p(g, x) = p(g) p(x | g).
    So the sum that includes the bits of g is a bound too, if x was predicted from the rounded g
    (`round_guiding_pixel`). It is exact where every level is AR and there is no guiding pixel.
    """
    bits = {}
    for term in terms:
        of_head = rows[term.level]
        values = of_head.weight[:, None] * term.nll.cpu().double() / LN2  # sync
        sums = values.new_zeros(len(rows[0].owner), values.shape[1])
        bits[term.name] = sums.index_add_(0, of_head.owner, values)
    return bits


def bits_by_level(model, terms: Sequence[LossTerm], rows: Sequence[Rows]) -> dict[str, Tensor]:
    """For each level, "level0", …, (B, 4, 2) float64: bits and their number of dimensions (paper, 5.1).

    Entry q counts the patches that were decided while quarter q of their level's patches was known, with
    everything inside them. All bits are spent on pixels, so no level has bits of its own. What a level
    contributes shows in how much cheaper a patch becomes as more of its level is known; where it does not,
    the level is weak or its patches have little in common.
    """
    spent = {term.level: term.nll.cpu().double().sum(1) / LN2 for term in terms}  # sync
    inside, found = spent[-1], {}  # (R,): the bits of each patch of the level, with everything inside it
    for level, generator in reversed(list(enumerate(model.generators))):
        of_level, received = rows[level + 1], rows[level]
        inside = inside + spent.get(level + 1, 0)
        values = torch.stack([of_level.weight * inside, of_level.weight * generator.spec.patch_dim], dim=1)
        sums = values.new_zeros(len(rows[0].owner) * QUARTERS, 2)
        sums.index_add_(0, of_level.owner * QUARTERS + of_level.quarter, values)
        found[f"level{level}"] = sums.view(-1, QUARTERS, 2)
        inside = inside.new_zeros(len(received.owner)).index_add_(0, of_level.parent, of_level.share * inside)
    return dict(reversed(found.items()))


def published_losses(terms: Sequence[LossTerm], rows: Sequence[Rows]) -> Tensor:
    """(B,) float64: the published evaluation loss of each image in bits (paper, 5.1).

    The published evaluation draws one number m of masked patches for all images of a pass and a level, takes
    the mean over the masked rows, and averages the passes. Here m differs between images, so a row counts
    1 / m times, level by level: an image counts the same whatever part of it is masked.
    """
    losses = torch.zeros(len(rows[0].owner), dtype=torch.float64)
    for term in terms:
        of_head = rows[term.level]
        values = of_head.weight * term.nll.cpu().double().mean(1) / LN2  # sync
        sums, weights = losses.new_zeros(2, len(losses)).index_add_(
            1, of_head.owner, torch.stack([values, of_head.weight])
        )
        losses += sums / weights
    return losses
