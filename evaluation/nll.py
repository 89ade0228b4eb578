"""Measures the likelihood of images; `--evaluate_nll` runs this (paper, 5.1)."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from models.fractalgen import FractalGen
from models.likelihood.bits import (
    QUARTERS,
    bits_by_level,
    bits_by_term,
    draw_steps,
    evaluation_terms,
    is_exact,
    meaning,
    published_losses,
    trace_rows,
)
from models.sampling.generate import eval_mode
from util import dist
from util.dist import World
from util.errors import UserError


@dataclass(frozen=True)
class Measured:
    """One pass over B images, float64 on the host.

    indices    (B,): the numbers of the images
    by_term    bits of each head (B, C)
    by_level   for each level, bits and dimensions by the quarter of it that was known (B, 4, 2)
    published  (B,): the published loss; None where it is not asked for
    """

    indices: Tensor
    by_term: dict[str, Tensor]
    by_level: dict[str, Tensor]
    published: Tensor | None


@torch.no_grad()
def compute_nll(
    model: FractalGen,
    loader: DataLoader,
    *,
    passes: int,
    seed: int,
    device: torch.device,
    autocast: AbstractContextManager,
    world: World,
    conditional: bool = False,
    num_iter_list: Sequence[int] | None = None,
    progress_bar: bool = True,
) -> dict:
    """Bits per dimension (`model.num_dims` of them) of the loader's images, over all processes (paper, 5.1).

    conditional    given the classes of the images; otherwise unconditional, as published
    passes         number of masks, or orders, for each image of each MAR level (a patch that is passed down
                   is an image of the next level); functions of (seed, image number, pass). Without MAR levels
                   there is one pass
    num_iter_list  None: a MAR level is estimated over all orders, one patch a step. Otherwise the exact
                   likelihood of what the unguided sampler does with so many steps, for the drawn orders; it
                   takes one pass for each step

    `models.likelihood.bits.bits_by_term` says in what sense the numbers are bounds. Returns
    bits_per_dim        the mean, an upper bound on the negative log-likelihood that includes the bits of
                        guiding pixels
    standard_error      of it, over images; with several passes also standard_error_of_passes, the part that
                        more passes remove
    bits_per_dim_<head> its parts by head: rgb (or cell), guiding1, …; they sum to it. by_channel: each head's
    parts by channel, see `Alphabet.channel_names`
    by_level            bits/dim of the patches decided while each quarter of their level was known, see
                        `bits_by_level`; None where there was no such patch
    published_nll       the expectation of the published evaluation loss, in bits. Without guiding pixels it
                        is bits_per_dim; with them guiding losses are not scaled, and guiding pixels are known
                        more exactly than they are paid for. Only for the unconditional estimate; costs
                        guided models a pass
    num_images, passes, and meaning: what bits_per_dim is, in words

    In float32 no number depends on batch size or processes by more than 1e-5 of itself. Raises UserError
    where the bits of an image are not finite, or where there is no image.
    """
    if conditional and model.class_num == 0:
        raise ValueError("conditional needs a model with classes; this one has class_num 0")
    if is_exact(model):
        passes = 1
    measured = []
    quiet = None if progress_bar and world.is_main else True  # None: a bar only on a terminal
    with eval_mode(model):
        for values, labels, indices in tqdm(loader, desc="likelihood", disable=quiet):
            images = model.alphabet.normalize(values.to(device, non_blocking=True))
            labels = labels.to(device)
            for number in range(passes):
                keys = (indices + number * len(loader.dataset)).tolist()
                noise = model.noise(seed, keys)
                with autocast:
                    measured.append(
                        _measure(model, images, labels, indices, noise, conditional, num_iter_list)
                    )
    gathered = [one for of_process in dist.gather(measured) for one in of_process]
    if not gathered:
        raise UserError(
            f"none of the {len(loader.dataset)} validation images can be read; "
            "python -m util.data.tool check lists them"
        )
    scores = _summary(gathered, passes, model)
    return {**scores, "meaning": meaning(model, bool(num_iter_list), guided=len(scores["by_channel"]) > 1)}


def _measure(model, images, labels, indices, noise, conditional, num_iter_list) -> Measured:
    """One pass, with the masks or orders that `noise` (on the host) decides."""
    masks = draw_steps(model, noise, num_iter_list) if num_iter_list else model.draw_masks(noise)
    inputs = model, images, labels, torch.full_like(labels, not conditional, dtype=torch.bool), masks
    terms = evaluation_terms(*inputs, round_guiding_pixel=True)
    rows = trace_rows(model, masks, len(images))
    published = None
    if not (conditional or num_iter_list):
        published = published_losses(evaluation_terms(*inputs) if len(terms) > 1 else terms, rows)
    return Measured(indices, bits_by_term(terms, rows), bits_by_level(model, terms, rows), published)


def _summary(measured: list[Measured], passes: int, model: FractalGen) -> dict:
    """The passes of all processes over all images -> what compute_nll returns."""
    indices = torch.cat([one.indices for one in measured])
    order = indices.argsort(stable=True)  # float sums do not depend on who measured which image
    images = len(indices) // passes
    joined = lambda name, part: torch.cat([getattr(one, name)[part] for one in measured])[order]  # noqa: E731
    by_term = {name: joined("by_term", name) / model.num_dims for name in measured[0].by_term}
    for name, bits in by_term.items():
        bad = ~bits.isfinite().all(1)
        if bad.any():
            found = indices[order][bad].unique()
            raise UserError(
                f"the likelihood is {bits[bad][0].sum().item()} bits at the {name} head for {len(found)} of "
                f"{images} validation images, the first is number {found[0].item()}: "
                "the weights are broken, or overflow (try --amp off)"
            )
    each = torch.stack(list(by_term.values())).sum((0, 2)).view(images, passes)
    total = each.mean(1)
    scores = {
        "bits_per_dim": total.mean().item(),
        "standard_error": total.std().item() / math.sqrt(images) if images > 1 else math.nan,
        **{f"bits_per_dim_{name}": bits.sum(1).mean().item() for name, bits in by_term.items()},
    }
    if passes > 1:
        scores["standard_error_of_passes"] = (each.var(1).mean() / (images * passes)).sqrt().item()
    if measured[0].published is not None:
        scores["published_nll"] = torch.cat([one.published for one in measured])[order].mean().item()
    scores |= {"num_images": images, "passes": passes}
    scores["by_channel"] = {
        name: dict(zip(model.alphabet.channel_names, bits.mean(0).tolist(), strict=True))
        for name, bits in by_term.items()
    }
    scores["by_level"] = {level: {} for level in measured[0].by_level}
    for level, quarters in scores["by_level"].items():
        for quarter, (bits, size) in enumerate(joined("by_level", level).sum(0).tolist()):
            known = f"known {100 * quarter // QUARTERS}-{100 * (quarter + 1) // QUARTERS}%"
            quarters[known] = bits / size if size else None
    return scores
