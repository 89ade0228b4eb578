"""From the terms of the loss to bits of each picture.

Letters: B pictures, N rows at a level, L patches a picture, R rows that go down.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from models.fractalgen import FractalGen, Term
from models.generator import Mask


def bits_by_term(
    model: FractalGen, terms: Sequence[Term], masks: Sequence[Mask | None], num_pictures: int
) -> dict[str, Tensor]:
    """The terms of one evaluation pass and its masks -> bits (B,) float32 of each picture, by name of the term.

    An AR level's rows count once. At a MAR level with m of L patches masked, each masked patch counts L / m times: with m
    uniform on 1..L this is an unbiased estimate of the mean negative log-likelihood over all orders (order-agnostic
    autoregression, Hoogeboom et al. 2021, arXiv 2110.02037, eq. 3), at each level and so for the product of levels.
    The sum over terms is a bound on -log2 p(picture): exact where every level is AR and there is no guiding pixel.
    """
    terms = {term.name: term.nll.sum(1) / math.log(2) for term in terms}  # (R,)
    device = next(iter(terms.values())).device
    owner = torch.arange(num_pictures, device=device)  # the picture that a row belongs to
    weight = torch.ones(num_pictures, device=device)  # how many patches the row stands for

    def per_picture(name: str) -> Tensor:
        return torch.zeros(num_pictures, device=device).index_add(0, owner, weight * terms[name])

    bits = {}
    for generator, mask in zip(model.generators, masks, strict=True):
        level, length = generator.spec.index, generator.spec.num_patches
        if f"guiding{level}" in terms:
            bits[f"guiding{level}"] = per_picture(f"guiding{level}")
        if mask is None:
            owner, weight = owner.repeat_interleave(length), weight.repeat_interleave(length)
        else:
            parent = mask.rows // length
            owner, weight = owner[parent], (weight * length / mask.masked.sum(1))[parent]
    bits["rgb"] = per_picture("rgb")
    return bits
