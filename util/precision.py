"""Chooses between bfloat16 and float32 by a measurement: a CPU may compute in bfloat16 and yet be slower."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Callable[[Tensor], Tensor]]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # the values of --amp, besides "off"
MIN_GAIN = 1.2  # bfloat16 must be faster by this factor: it is less exact, and the measurement is noisy
MAX_ROWS = 64  # of a measured product; for more, the time grows in proportion
MAX_WIDENING = 8  # so wide is a product of few rows that its weights, as a whole model's, fit in no cache


class Product(NamedTuple):
    """A product of `rows` x `width` numbers with a `width` x `width` matrix, computed `count` times."""

    rows: int
    width: int
    count: float


def autocast(amp: str, device: torch.device) -> AbstractContextManager:
    """The context manager of `amp`, a key of DTYPES or "off"."""
    return nullcontext() if amp == "off" else torch.autocast(device.type, DTYPES[amp])


@contextmanager
def exact_float32() -> Iterator[None]:
    """Computes float32 without TF32 within this block, so that scores depend little on the device."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def plain_linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The product as training and likelihoods compute it."""
    return lambda x: F.linear(x, weight)


def choose_amp(
    device: torch.device, products: Sequence[Product], linear: Linear = plain_linear
) -> tuple[str, str]:
    """Returns "bf16" or "off" for a model that consists of these products, and the reason in words.

    `linear` makes a function from a weight (O, I) that multiplies rows (M, I) by it.

    On an accelerator the hardware decides: bfloat16 where it computes in it without emulation. On a CPU a
    measurement decides, of at most about 0.2 s.
    """
    if device.type != "cpu":
        supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
        if supported is not None and supported(including_emulation=False):
            return "bf16", f"this {device.type} device computes in bfloat16"
        return "off", f"this {device.type} device does not compute in bfloat16"
    gain = bf16_gain(tuple(products), linear)
    reason = f"products of the model's sizes are {gain:.2g} times as fast in bfloat16 as in float32"
    return ("bf16" if gain >= MIN_GAIN else "off"), reason


@cache
def bf16_gain(products: tuple[Product, ...], linear: Linear = plain_linear) -> float:
    """How many times as fast the CPU computes these products in bfloat16 as in float32; it is measured.

    One thread's own time is measured, so that other processes on the machine change the result little.
    """
    in_float32, in_bf16, threads = 0.0, 0.0, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for rows, width, count in products:
            measured = min(rows, MAX_ROWS)
            weight = torch.ones(width * max(1, min(MAX_WIDENING, MAX_ROWS // measured)), width)
            in_float32 += count * rows / measured * _secs(measured, weight, linear)
            in_bf16 += count * rows / measured * _secs(measured, weight.bfloat16(), linear)
    finally:
        torch.set_num_threads(threads)
    return in_float32 / in_bf16


@torch.no_grad()
def _secs(rows: int, weight: Tensor, linear: Linear) -> float:
    """The shortest of several times of a product; the first includes what is done once."""
    x, multiply, secs = weight.new_ones(rows, weight.shape[1]), linear(weight), []
    while len(secs) < 2 or (len(secs) < 4 and sum(secs) < 0.02):
        began = time.thread_time()
        multiply(x)
        secs.append(time.thread_time() - began)
    return min(secs)
