import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models.layers import Block, KVCache, RMSNorm, RotaryBlock, plain_attention, run_blocks
from models.rope import rotate, rotation_table


@pytest.mark.parametrize("causal", [False, True])
def test_plain_attention_equals_the_fused_one(causal):
    q, k, v = torch.randn(3, 5, 2, 3, 8)
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(plain_attention(q, k, v, causal), fused, rtol=1e-5, atol=1e-6)


class SpySoftmax(TorchDispatchMode):
    """Notes the dtype of every softmax."""

    def __init__(self, met: list):
        super().__init__()
        self.met = met

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._softmax.default:
            self.met.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


def test_softmax_is_float32_whatever_the_input():
    q, k, v = torch.randn(3, 2, 2, 3, 8).bfloat16()
    met = []
    with SpySoftmax(met), torch.autocast("cpu", torch.bfloat16):
        assert plain_attention(q, k, v, True).dtype == torch.bfloat16
    assert met == [torch.float32]


@pytest.mark.parametrize("tokens", [3, 10])
def test_tokens_one_by_one_through_the_cache_equal_the_causal_pass(tokens):
    block = Block(16, 2).eval()
    x = torch.randn(4, tokens, 16)
    cache = KVCache(4, 2, tokens, 8, x)
    steps = [block(x[:, t : t + 1], False, cache) for t in range(tokens)]
    torch.testing.assert_close(torch.cat(steps, dim=1), block(x, True), rtol=1e-5, atol=1e-5)


def test_dropout_on_attention_weights_only_in_training():
    block = Block(16, 2, attn_dropout=0.5)
    x = torch.randn(2, 3, 16)
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


def test_rms_norm_computes_in_float32():
    norm = RMSNorm(16, eps=1e-5)
    x = torch.randn(4, 16)
    expected = x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(norm(x), expected)
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    exact = (expected := x.bfloat16().float()) * (expected.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert torch.equal(norm(x.bfloat16()), exact.bfloat16())


def test_rotation_turns_row_half_by_row_and_column_half_by_column():
    cos, sin = rotation_table(3, 8)
    assert cos.shape == (10, 4)
    assert not cos[0].any()  # the condition token becomes a zero vector
    assert not sin[0].any()
    x = torch.randn(1, 1, 10, 8)
    turned = rotate(x, (cos, sin))
    assert not turned[0, 0, 0].any()
    y, column = 2, 1
    token = 1 + 3 * y + column
    pairs = torch.view_as_complex(x[0, 0, token].view(4, 2).double())
    angles = torch.tensor([y * 1.0, y * 10000**-0.5, column * 1.0, column * 10000**-0.5], dtype=torch.float64)
    expected = torch.view_as_real(pairs * torch.polar(torch.ones(4, dtype=torch.float64), angles)).flatten()
    torch.testing.assert_close(turned[0, 0, token].double(), expected, rtol=1e-5, atol=1e-6)


def test_swiglu_width_is_rounded_up_to_256():
    assert RotaryBlock(1024, 16, 0.0).feed_forward.w1.out_features == 2816
    assert RotaryBlock(32, 2, 0.0).feed_forward.w1.out_features == 256


def test_checkpointing_changes_nothing():
    blocks = torch.nn.ModuleList(Block(16, 2) for _ in range(2))
    results = []
    for checkpointing in (False, True):
        x = torch.ones(2, 5, 16, requires_grad=True)
        out = run_blocks(blocks, x, checkpointing=checkpointing)
        grads = torch.autograd.grad(out.square().sum(), [x, *blocks.parameters()])
        results.append([out, *grads])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
