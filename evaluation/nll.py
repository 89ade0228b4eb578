"""The likelihood of images: what `--evaluate_nll` runs."""

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
    loss_sums,
    meaning,
    trace_rows,
)
from models.noise import Noise
from models.sampling.generate import eval_mode
from util import dist
from util.dist import World
from util.errors import UserError
from util.pixels import normalize


@dataclass(frozen=True)
class Measured:
    """One pass over B images, float64 on the host: their numbers (B,), bits by head (B, 3), bits and sub-pixels by level and
    quarter known (B, 4, 2), and the published loss's sums and numbers of rows (B, terms, 2)."""

    indices: Tensor
    by_term: dict[str, Tensor]
    by_level: dict[str, Tensor]
    published: Tensor


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
    """Bits per dimension (3 * H * W of them) of the loader's images, over all processes (SPEC sections 1, 3).

    conditional    given the images' classes; else unconditional, as published
    passes         masks (each with its own count), or orders, for each image of each MAR level, where a patch that goes down
                   is an image of the next; functions of (seed, image number, pass). Without MAR levels there is one pass
    num_iter_list  None: a MAR level is estimated over all orders, one patch a step. Else the exact likelihood of what the
                   unguided sampler does with so many steps, for the drawn orders; one trunk pass a step

    In what sense the numbers are bounds: see `models.likelihood.bits.bits_by_term`. Returns
    bits_per_dim        their mean, an upper bound on the negative log-likelihood, guiding pixels' bits in it
    standard_error      of it, over images; with several passes also standard_error_of_passes, the part that more would remove
    bits_per_dim_<head> its parts by head: rgb, guiding1, …; by_channel: each head's parts by R, G, B. Parts sum to the total
    by_level            bits/dim of the patches decided while that quarter of their level was known, see `bits_by_level`; None
                        where there was no such patch
    published_nll       the mean published evaluation loss in bits: guiding losses unscaled, and more told than paid for;
                        only of the unconditional estimate. Costs guided models a second pass
    num_images, passes, and meaning: what bits_per_dim is, in words

    In float32 no number depends on batch size or processes by more than 1e-5 of itself. Raises UserError where a
    image's bits are not finite, or where there is no image.
    """
    if conditional and model.class_num == 0:
        raise ValueError("conditional needs a model with classes; this one has class_num 0")
    if all(mask is None for mask in model.draw_masks(Noise.of_images(seed, [0], model.noise_sizes))):
        passes = 1
    measured = []
    quiet = None if progress_bar and world.is_main else True  # None: a bar on a terminal only
    with eval_mode(model):
        for levels, labels, indices in tqdm(loader, desc="likelihood", disable=quiet):
            images, labels = normalize(levels.to(device, non_blocking=True)), labels.to(device)
            for number in range(passes):
                keys = (indices + number * len(loader.dataset)).tolist()
                noise = Noise.of_images(seed, keys, model.noise_sizes)
                with autocast:
                    measured.append(
                        _measure(model, images, labels, indices, noise, conditional, num_iter_list)
                    )
    gathered = [one for of_process in dist.gather(measured) for one in of_process]
    if not gathered:
        raise UserError(
            f"none of the {len(loader.dataset)} validation images can be read; see dataset_tool check"
        )
    scores = _summary(gathered, passes, 3 * model.img_size_list[0] ** 2)
    return {**scores, "meaning": meaning(model, bool(num_iter_list), guided=len(scores["by_channel"]) > 1)}


def _measure(model, images, labels, indices, noise, conditional, num_iter_list) -> Measured:
    """One pass, with the masks or orders that `noise` (on the host) decides."""
    masks = draw_steps(model, noise, num_iter_list) if num_iter_list else model.draw_masks(noise)
    masks = [mask and mask.to(images.device) for mask in masks]
    drop = torch.full_like(labels, not conditional, dtype=torch.bool)
    settings = dict(masks=masks, label_drop=drop, train=False, dither=0.0, return_terms=True)
    _, terms = model(images, labels, as_drawn=True, **settings)
    rows = trace_rows(model, masks, len(images))
    published = torch.empty(len(images), 0, 2, dtype=torch.float64)
    if not (conditional or num_iter_list):
        as_published = model(images, labels, **settings)[1] if len(terms) > 1 else terms
        published = loss_sums(as_published, rows)
    return Measured(indices, bits_by_term(terms, rows), bits_by_level(model, terms, rows), published)


def _summary(measured: list[Measured], passes: int, dims: int) -> dict:
    """The passes of all processes over all images -> what compute_nll returns; `dims` sub-pixels an image."""
    indices = torch.cat([one.indices for one in measured])
    order = indices.argsort(stable=True)  # float sums do not depend on who measured which image
    images = len(indices) // passes
    assert torch.equal(
        indices[order].view(images, passes).unique(dim=0), indices.unique()[:, None].expand(-1, passes)
    )
    collect = lambda name, part: torch.cat([getattr(one, name)[part] for one in measured])[order]  # noqa: E731
    by_term = {name: collect("by_term", name) / dims for name in measured[0].by_term}  # (images * passes, 3)
    for name, bits in by_term.items():
        _require_finite(bits, name, indices[order], images)
    each = torch.stack(list(by_term.values())).sum((0, 2)).view(images, passes)
    total = each.mean(1)
    scores = {
        "bits_per_dim": total.mean().item(),
        "standard_error": _standard_error(total),
        **{f"bits_per_dim_{name}": bits.sum(1).mean().item() for name, bits in by_term.items()},
    }
    if passes > 1:
        scores["standard_error_of_passes"] = (each.var(1).mean() / (images * passes)).sqrt().item()
    if measured[0].published.shape[1]:
        sums = torch.cat([one.published for one in measured])[order].sum(0)  # (terms, 2)
        scores["published_nll"] = (sums[:, 0] / sums[:, 1]).sum().item()
    levels = {level: collect("by_level", level).sum(0).tolist() for level in measured[0].by_level}
    quarters = [f"known {100 * q // QUARTERS}-{100 * (q + 1) // QUARTERS}%" for q in range(QUARTERS)]
    return {
        **scores,
        "num_images": images,
        "passes": passes,
        "by_channel": {
            name: dict(zip("rgb", bits.mean(0).tolist(), strict=True)) for name, bits in by_term.items()
        },
        "by_level": {
            level: {
                name: bits / size if size else None for name, (bits, size) in zip(quarters, sums, strict=True)
            }
            for level, sums in levels.items()
        },
    }


def _standard_error(values: Tensor) -> float:
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan


def _require_finite(bits: Tensor, term: str, indices: Tensor, images: int) -> None:
    """`bits` (rows, 3) of the images `indices` (rows,)."""
    bad = ~bits.isfinite().all(1)
    if bad.any():
        found = indices[bad].unique()
        raise UserError(
            f"the likelihood is {bits[bad][0].sum().item()} bits at the {term} head for {len(found)} of {images} validation "
            f"images, the first is number {found[0].item()}: the weights are broken, or overflow (try --amp off)"
        )
