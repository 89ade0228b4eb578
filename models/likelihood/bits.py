"""From the terms of the loss to bits of each image: by head and channel, and by how much of each level was known.

Letters: B images, L patches an image, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.generator import Generator, Mask, Steps
from models.noise import Noise

if TYPE_CHECKING:
    from models.fractalgen import FractalGen, Term  # whose models read their own likelihoods

QUARTERS = 4
LN2 = math.log(2)


def draw_steps(model: FractalGen, noise: Noise, num_iter_list: Sequence[int]) -> list[Steps | None]:
    """The steps, for `num_iter_list`, in which the sampler decides the patches of the images of `noise` (on the host), at
    all levels: what `model(images, labels, masks=…)` takes to follow the sampler."""
    steps = []
    for generator, num_iter in zip(model.generators, num_iter_list, strict=True):
        steps.append(generator.draw_steps(noise, num_iter))
        noise = noise.rows(torch.arange(noise.order.numel()))
    return steps


def meaning(model: FractalGen, in_steps: bool, guided: bool) -> str:
    """What the bits of `bits_by_term` are for this model, in words for a report."""
    types = {type(generator).draw_mask for generator in model.generators}
    if types == {Generator.draw_mask}:
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
    """What a level gets, the whole images at level 0, all tensors (R,) on the host: patches that the level above handed down.

    parent   number of the image of the level above that it is part of
    owner    number of the whole image
    share    how many patches of the parent it stands for; weight: how many of the whole image
    quarter  0..3: which quarter of the parent's patches was known when it was decided
    """

    parent: Tensor
    owner: Tensor
    share: Tensor
    weight: Tensor
    quarter: Tensor


def trace_rows(model: FractalGen, masks: Sequence[Mask | Steps | None], num_images: int) -> list[Rows]:
    """The rows of every level under these masks, those of the RGB head last."""
    own, ones = torch.arange(num_images), torch.ones(num_images, dtype=torch.float64)
    rows = [Rows(own, own, ones, ones, torch.zeros_like(own))]
    for generator, mask in zip(model.generators, masks, strict=True):
        rows.append(_rows_below(generator, mask, rows[-1]))
    return rows


def _rows_below(generator: Generator, mask: Mask | Steps | None, above: Rows) -> Rows:
    length, n = generator.spec.num_patches, len(above.owner)
    if isinstance(mask, Mask):
        numbers, masked = mask.rows.cpu(), mask.masked.cpu().sum(1)
        parent = numbers // length
        share, known = (length / masked.double())[parent], (length - masked)[parent]
    else:
        plan = mask.plan if mask is not None else [(begin, end) for begin, end, _ in generator.plan(length)]
        known = torch.cat([torch.full((end - begin,), begin) for begin, end in plan]).repeat(n, 1)
        if mask is not None:
            known = known.scatter(1, mask.order.cpu(), known)
        parent, known = torch.arange(n).repeat_interleave(length), known.flatten()
        share = torch.ones(n * length, dtype=torch.float64)
    return Rows(parent, above.owner[parent], share, above.weight[parent] * share, QUARTERS * known // length)


def rows_of_term(term: Term, rows: Sequence[Rows]) -> Rows:
    """The rows of `trace_rows` whose pixels the term's head predicts."""
    return rows[-1 if term.name == "rgb" else int(term.name.removeprefix("guiding"))]


def bits_by_term(terms: Sequence[Term], rows: Sequence[Rows]) -> dict[str, Tensor]:
    """The terms of one evaluation pass and its rows -> bits (B, 3) float64 of R, G, B of each image, by name of the term.

    An AR level's rows count once, and so do those of a MAR level that follows the sampler's Steps: the sum is then
    -log2 p(image | the drawn orders), exactly as the unguided sampler draws. At a MAR level with a Mask of m of L patches,
    each masked patch counts L / m times: with m uniform on 1..L this is an unbiased estimate of the mean negative
    log-likelihood over all orders, one patch a step (order-agnostic autoregression, Hoogeboom et al. 2021, arXiv
    2110.02037, eq. 3), at each level and so for the product of levels. p(image) is the mean of p(image | orders), so
    by Jensen's inequality either number has an expectation of at least -log2 p(image).

    Guiding pixels g are a function of the image x, and the model draws both: p(x) >= p(g, x) = p(g) p(x | g). So with
    g's bits the sum is a bound too, provided that x was predicted from the rounded g that they pay for (`as_drawn`).
    Exact where every level is AR and there is no guiding pixel.
    """
    bits = {}
    for term in terms:
        of_head = rows_of_term(term, rows)
        values = of_head.weight[:, None] * term.nll.cpu().double() / LN2
        bits[term.name] = values.new_zeros(len(rows[0].owner), 3).index_add_(0, of_head.owner, values)
    return bits


def bits_by_level(model: FractalGen, terms: Sequence[Term], rows: Sequence[Rows]) -> dict[str, Tensor]:
    """(B, 4, 2) float64 for each level, "level0", …: bits of the patches that were decided while that quarter of their
    level's patches was known, with everything inside them, and how many sub-pixels these patches stand for.

    All bits are paid for pixels, so no level has bits of its own; what a level contributes shows in how much cheaper a patch
    becomes as more of its level is known. A level where it does not is weak, or its patches have little in common.
    """
    guiding = {int(term.name.removeprefix("guiding")): term.nll for term in terms if term.name != "rgb"}
    paid = (
        next(term.nll for term in terms if term.name == "rgb").cpu().double().sum(1) / LN2
    )  # (R,), with all inside it
    found = {}
    for level, generator in reversed(list(enumerate(model.generators))):
        of_level = rows[level + 1]
        if level + 1 in guiding:
            paid = paid + guiding[level + 1].cpu().double().sum(1) / LN2
        values = torch.stack([of_level.weight * paid, of_level.weight * generator.spec.patch_dim], dim=1)
        sums = values.new_zeros(len(rows[0].owner) * QUARTERS, 2)
        sums.index_add_(0, of_level.owner * QUARTERS + of_level.quarter, values)
        found[f"level{level}"] = sums.view(-1, QUARTERS, 2)
        paid = paid.new_zeros(len(rows[level].owner)).index_add_(0, of_level.parent, of_level.share * paid)
    return dict(reversed(found.items()))


def loss_sums(terms: Sequence[Term], rows: Sequence[Rows]) -> Tensor:
    """(B, terms, 2) float64: for each image and term, the sum over its rows of the mean over channels, in bits, and the
    number of rows. The published evaluation loss is the sum over terms of all sums / all numbers."""
    sums = []
    for term in terms:
        values = term.nll.cpu().double().mean(1) / LN2
        of_rows = torch.stack([values, torch.ones_like(values)], dim=1)
        sums.append(
            of_rows.new_zeros(len(rows[0].owner), 2).index_add_(0, rows_of_term(term, rows).owner, of_rows)
        )
    return torch.stack(sums, dim=1)
