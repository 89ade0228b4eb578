"""Which dtype sampling computes in, and the products by which it is chosen."""

import pytest
import torch

from conftest import opinionated, tiny_model
from models.sampling import generate as generate_module
from models.sampling import precision
from models.sampling.precision import sampling_dtype, sampling_products, training_products
from util.precision import Product


def test_the_products_of_a_model_are_those_of_its_blocks():
    """8 px images in 16 patches of 4 pixels: an AR level computes a token a step, a MAR level all of them."""
    ar, mar = tiny_model("ar"), tiny_model("mar")
    assert training_products(ar, 3) == [Product(48, 32, 2), Product(192, 16, 1), Product(192, 16, 1)]
    assert sampling_products(ar) == [Product(2, 32, 32), Product(2, 16, 64), Product(2, 16, 192)]
    assert sampling_products(mar)[:2] == [Product(32, 32, 32), Product(8, 16, 64)]
    grey = tiny_model("ar", channels=1)  # the head takes one token for each channel
    assert sampling_products(grey)[-1] == Product(2, 16, 64)


@pytest.mark.parametrize(("gain", "dtype"), [(2.0, torch.bfloat16), (0.9, torch.float32)])
def test_generate_and_edit_compute_in_what_is_faster(monkeypatch, gain, dtype):
    model, used = opinionated(tiny_model("mar")), []
    monkeypatch.setattr("util.precision.bf16_gain", lambda *products: gain)
    plain = generate_module.Setup
    monkeypatch.setattr(
        generate_module, "Setup", lambda dtype, options: used.append(dtype) or plain(dtype, options)
    )
    images = model.generate([1], seed=0, output_type="np", progress_bar=False)
    model.edit(images[0], torch.ones(8, 8, dtype=torch.bool), 1, seed=0, progress_bar=False)
    assert used == [dtype, dtype]


@pytest.mark.parametrize(("num_images", "threads"), [(1, 1), (16, 3)])
def test_small_work_is_done_by_one_thread(monkeypatch, num_images, threads):
    model, used = opinionated(tiny_model("mar")), []
    monkeypatch.setattr(precision, "MIN_SHARED_WORK", 10 * work_of_an_image(model))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        watch = lambda *step: used.append(torch.get_num_threads())  # noqa: E731
        model.generate([1] * num_images, seed=0, progress_bar=False, callback_on_step_end=watch)
        assert set(used) == {threads}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def work_of_an_image(model) -> float:
    products = sampling_products(model)
    return sum(count * rows * width**2 for rows, width, count in products) / sum(p.count for p in products)


def test_autocast_and_the_option_come_before_the_measurement(monkeypatch):
    model = tiny_model("mar")
    monkeypatch.setattr("util.precision.bf16_gain", lambda *products: 2.0)
    assert sampling_dtype(model, None) == torch.bfloat16
    assert sampling_dtype(model, "off") == torch.float32
    assert sampling_dtype(model, "fp16") == torch.float16
    with torch.autocast("cpu", torch.float16):
        assert sampling_dtype(model, None) == sampling_dtype(model, "off") == torch.float16
    assert sampling_dtype(model.half(), None) == torch.float16
    with pytest.raises(ValueError, match="amp 'half' must be None or one of off, bf16, fp16"):
        model.generate([1], amp="half")


def test_the_published_call_computes_in_the_dtype_of_the_weights(monkeypatch):
    model = opinionated(tiny_model("mar"))
    conds = [model.fake_latent] * model.num_conds
    monkeypatch.setattr("models.sampling.precision.choose_amp", lambda *_: pytest.fail("measured"))
    assert model.sample(conds, (4, 2)).shape == (1, 3, 8, 8)
