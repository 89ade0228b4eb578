"""bfloat16 is chosen by a measurement on a CPU, and by what the hardware has on an accelerator."""

import time
from types import SimpleNamespace

import pytest
import torch

from util import precision
from util.precision import Product

CPU, MEASURED = torch.device("cpu"), precision.bf16_gain.__wrapped__  # before the fixture replaces it


@pytest.mark.parametrize(("gain", "chosen"), [(3.0, "bf16"), (1.1, "off"), (0.1, "off")])
def test_a_cpu_gets_bfloat16_only_if_it_is_clearly_faster(monkeypatch, gain, chosen):
    monkeypatch.setattr(precision, "bf16_gain", lambda *products: gain)
    amp, reason = precision.choose_amp(CPU, [Product(4, 8, 1)])
    assert amp == chosen
    assert f"{gain:.2g} times as fast in bfloat16" in reason


@pytest.mark.parametrize(("has_it", "chosen"), [(True, "bf16"), (False, "off")])
def test_an_accelerator_is_asked(monkeypatch, has_it, chosen):
    module = SimpleNamespace(is_bf16_supported=lambda including_emulation: has_it and not including_emulation)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert precision.choose_amp(torch.device("cuda", 0), [])[0] == chosen
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert precision.choose_amp(torch.device("mps", 0), [])[0] == "off"


def slow_linear(secs_of: dict[torch.dtype, float]):
    """A linear layer that takes so many seconds of this thread for a product of 1000 rows x outputs."""

    def linear(weight):
        def multiply(x):
            until = time.thread_time() + secs_of[weight.dtype] * len(x) * len(weight) / 1000
            while time.thread_time() < until:
                pass

        return multiply

    return linear


def test_the_gain_is_that_of_all_products_together():
    """Of two products one is faster in bfloat16 and the other slower; their counts decide."""
    fast, slow = Product(64, 2, 1), Product(64, 4, 1)

    def linear(weight):
        gain = 2.0 if weight.shape[1] == 2 else 0.5
        secs = {torch.float32: 0.01, torch.bfloat16: 0.01 / gain}
        return slow_linear(secs)(weight[:1].expand(100, -1))

    assert MEASURED((fast,), linear) == pytest.approx(2, rel=0.1)
    assert MEASURED((slow,), linear) == pytest.approx(0.5, rel=0.1)
    assert MEASURED((fast, slow), linear) == pytest.approx((1 + 1) / (0.5 + 2), rel=0.1)
    assert MEASURED((Product(6400, 2, 9), slow), linear) == pytest.approx(901 / (450 + 2), rel=0.1)


def test_a_real_measurement_is_short_and_leaves_the_number_of_threads():
    threads, began = torch.get_num_threads(), time.thread_time()
    gain = MEASURED((Product(4096, 512, 8), Product(2, 256, 8)))
    assert gain > 0
    assert time.thread_time() - began < 1
    assert torch.get_num_threads() == threads


def test_autocast_of_a_flag():
    with precision.autocast("bf16", CPU):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    with precision.autocast("off", CPU):
        assert not torch.is_autocast_enabled("cpu")
