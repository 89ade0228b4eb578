"""Chooses dtype and threads by a model's matrix products: bfloat16 only where that is faster, and one thread
where two are not (docs/speed.md). Refuses results that are not finite.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import ceil

import torch
from torch import Tensor, nn

from models.sampling.canvas import sampler_class
from models.sampling.prepare import FastLinear
from util.errors import UserError
from util.precision import DTYPES, Product, choose_amp
from util.threads import num_threads

log = logging.getLogger(__name__)
MIN_SHARED_WORK = 5e5  # multiply-adds of a product, on average; one thread is as fast with fewer


def training_products(model, num_images: int) -> list[Product]:
    """The matrix products of a forward pass over `num_images` images, by level, the head last."""
    rows = [num_images]
    for generator in model.generators:
        rows.append(rows[-1] * generator.spec.num_patches)
    return _products(model, rows[1:] + rows[-1:], [1] * len(rows))


def sampling_products(model) -> list[Product]:
    """The matrix products of sampling one image with guidance, by level, the head last.

    They are those of one image, however many are sampled together, so that an image does not depend on that.
    """
    images, rows, calls = 2, [], [1]
    for generator, num_iter in zip(
        model.generators, model.sampling_defaults.num_inference_steps, strict=True
    ):
        steps = len(list(generator.plan(num_iter)))
        rows.append(images * sampler_class(generator).tokens_in_step(generator))
        images = ceil(images * generator.spec.num_patches / steps)
        calls.append(calls[-1] * steps)
    return _products(model, [*rows, images], [*calls[1:], model.alphabet.channels * calls[-1]])


def _products(model, rows, calls) -> list[Product]:
    """Products of these numbers of rows, as often as the level's blocks are called."""
    widths, blocks = (model.arguments[f"{name}_list"] for name in ("embed_dim", "num_blocks"))
    return [Product(r, d, n * c) for r, d, n, c in zip(rows, widths, blocks, calls, strict=True)]


def choose_model_amp(model, device: torch.device, num_images: int | None = None) -> tuple[str, str]:
    """Returns "bf16" or "off" for this model on `device`, and the reason in words (see `choose_amp`).

    It is for training on `num_images` images in a step; None: for sampling.
    """
    if num_images is not None:
        return choose_amp(device, training_products(model, num_images))
    return choose_amp(device, sampling_products(model), packed_linear)


def sampling_dtype(model, amp: str | None) -> torch.dtype:
    """The dtype of matrix products in sampling. Under torch.autocast it is autocast's.

    Otherwise "bf16", "fp16" and "off" (the dtype of the weights) say it, and None chooses for weights of
    float32: see `choose_amp`.
    """
    device, own = model.fake_latent.device, model.generator.dtype
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    if amp is None and own == torch.float32:
        amp = _choose_once(device, tuple(sampling_products(model)))
    return DTYPES.get(amp, own)


@contextmanager
def few_threads(model, num_images: int) -> Iterator[None]:
    """Within this block torch computes with one thread if sampling `num_images` images has no work for more.

    A second thread that gains nothing takes a core from others, and waits where they have taken it.
    """
    threads, products = torch.get_num_threads(), sampling_products(model)
    work = num_images * sum(p.count * p.rows * p.width**2 for p in products) / sum(p.count for p in products)
    few = model.fake_latent.device.type == "cpu" and work < MIN_SHARED_WORK
    with num_threads(1 if few else threads):
        yield


@cache
def _choose_once(device: torch.device, products: tuple[Product, ...]) -> str:
    amp, reason = choose_amp(device, products, packed_linear)
    log.info("sampling computes in %s: %s", DTYPES.get(amp, torch.float32), reason)
    return amp


def packed_linear(weight: Tensor) -> FastLinear:
    """The product as sampling computes it."""
    return FastLinear(weight, None, weight.dtype)


def check_finite(model: nn.Module, results: Tensor, cause: str) -> None:
    """Raises UserError if a weight of `model` or a number in `results` is not finite.

    The message names the weight; where all weights are finite it is "<cause>, although all weights are
    finite". The weights are checked too, because results do not always show them: on a CPU, attention with
    queries that are NaN gives zeros. The host waits for the device once.
    """
    # One operation for all plain tensors, where parameters take one each. It also overflows above 1e19.
    norm = nn.utils.get_total_norm([weight.detach() for weight in model.parameters()])
    if norm.isfinite() & results.isfinite().all():  # sync
        return
    for name, weight in model.named_parameters():
        bad = weight[~weight.isfinite()]
        if len(bad):
            raise UserError(f"weight {name} of the model is not finite ({bad[0].item()}); load other weights")
    if not results.isfinite().all():
        raise UserError(f"{cause}, although all weights are finite")
