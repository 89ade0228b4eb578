import pytest
import torch
import torch.nn.functional as F

from models.recompute import Dropout, RMSNorm, swiglu


def assert_same_with_gradients(ours, reference, inputs):
    """Asserts that two functions of `inputs` have the same outputs and the same gradients."""
    results = []
    for function in (ours, reference):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_mean_and_its_gradient_the_mask(p):
    x = torch.full((101, 1003), 2.0, requires_grad=True)
    y = Dropout(p).train()(x)
    dropped = y == 0
    share, error = dropped.float().mean().item(), (p * (1 - p) / x.numel()) ** 0.5
    assert abs(share - p) < 4 * error
    torch.testing.assert_close(y[~dropped].detach(), torch.full((), 2 / (1 - p)).expand((~dropped).sum()))
    y.sum().backward()
    assert torch.equal(x.grad == 0, dropped)
    torch.testing.assert_close(x.grad[~dropped], torch.full((), 1 / (1 - p)).expand((~dropped).sum()))
    assert torch.equal(Dropout(p).eval()(x), x)


def test_dropout_follows_torchs_generator_and_differs_between_calls():
    x, drop = torch.ones(50, 50), Dropout(0.5).train()
    torch.manual_seed(1)
    first, second = drop(x), drop(x)
    torch.manual_seed(1)
    assert torch.equal(drop(x), first)
    assert not torch.equal(first, second)


def test_dropped_product_equals_dropout_then_product():
    drop = Dropout(0.3).train()
    weights, values = torch.rand(2, 3, 7, 5).softmax(-1), torch.randn(2, 5, 3, 4).transpose(1, 2)

    def seeded(function):
        def run(*inputs):
            torch.manual_seed(0)
            return function(*inputs)

        return run

    assert_same_with_gradients(seeded(drop.product), seeded(lambda w, v: drop(w) @ v), [weights, values])


def test_dropped_product_keeps_neither_what_was_dropped_nor_other_heads():
    saved, drop = [], Dropout(0.3).train()
    weights = torch.rand(2, 3, 7, 7, requires_grad=True)
    qkv = torch.randn(2, 7, 3, 3, 4, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        drop.product(weights, qkv[:, :, 2].transpose(1, 2))
    assert [t.dtype for t in saved if t.shape == weights.shape].count(torch.float32) == 1
    assert all(
        t.untyped_storage().nbytes() < qkv.untyped_storage().nbytes() for t in saved if t.shape[-1] == 4
    )


def test_rms_norm_computes_in_float32():
    norm = RMSNorm(16, eps=1e-5)
    x = torch.randn(4, 16)
    expected = x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(norm(x), expected)
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    exact = (expected := x.bfloat16().float()) * (expected.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert torch.equal(norm(x.bfloat16()), exact.bfloat16())


def test_rms_norm_and_its_gradients_equal_torchs():
    norm = RMSNorm(16, eps=1e-5)
    reference = lambda x, w: F.rms_norm(x, (16,), w, 1e-5)  # noqa: E731
    ours = lambda x, w: torch.func.functional_call(norm, {"weight": w}, x)  # noqa: E731
    x = torch.randn(3, 5, 16) * torch.logspace(-4, 1, 15).view(3, 5, 1)  # small rows meet eps
    assert_same_with_gradients(ours, reference, [x, torch.rand(16) + 0.5])


def test_swiglu_and_its_gradients_equal_torchs():
    assert_same_with_gradients(swiglu, lambda a, b: F.silu(a) * b, [torch.randn(3, 9) * 4, torch.randn(3, 9)])
