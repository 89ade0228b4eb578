from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models.attention import SelfAttention, plain_attention, rotate, rotation_table
from models.layers import LayerNormBlock, RMSNormBlock, run_blocks
from models.recompute import Dropout


@pytest.mark.parametrize("causal", [False, True])
def test_plain_attention_equals_the_fused_one(causal):
    q, k, v = torch.randn(3, 5, 2, 3, 8)
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(plain_attention(q, k, v, causal), fused, rtol=1e-5, atol=1e-6)


class SpySoftmax(TorchDispatchMode):
    """Appends the dtype of every softmax to the list `met`."""

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


def test_one_query_equals_the_fused_kernel():
    q, (k, v) = torch.randn(5, 2, 1, 8), torch.randn(2, 5, 2, 3, 8)
    torch.testing.assert_close(
        plain_attention(q, k, v, False), F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_dropout_keeps_no_square_of_the_tokens(dtype):
    saved = []
    x = torch.randn(2, 24, 16, requires_grad=True)
    block, rotary = LayerNormBlock(16), RMSNormBlock(16, 0.1)
    rotation = tuple(t[:24] for t in rotation_table((5, 5), 8))
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t)
    with keep, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        outputs = [run_blocks([block], x, SelfAttention(2, 24, causal=causal)) for causal in (True, False)]
        outputs.append(run_blocks([rotary], x, SelfAttention(2, 24, causal=True, rotation=rotation)))
        sum(out.sum() for out in outputs).backward()
    assert saved
    assert not [shape for shape in saved if shape[-2:] == (24, 24)]


def test_dropout_on_attention_weights_only_in_training():
    block, drop, x = LayerNormBlock(16), Dropout(0.5), torch.randn(6, 16)
    attend = SelfAttention(2, 3, dropout=drop)
    assert not torch.equal(block(x, attend), block(x, attend))
    drop.eval()
    assert torch.equal(block(x, attend), block(x, attend))


@pytest.mark.parametrize("block", [LayerNormBlock(16), RMSNormBlock(16, 0.0)])
def test_some_rows_of_a_block_are_those_of_all(block):
    x, rows, seen = torch.randn(12, 16), torch.tensor([1, 2, 4, 7, 9, 8]), []
    attend = SelfAttention(2, 4)
    some = block(x, lambda *projected: seen.append([p.shape for p in projected]) or attend(*projected), rows)
    torch.testing.assert_close(some, block(x, attend)[rows])
    assert seen == [[(6, 16), (12, 32)]]


def test_rotation_turns_row_half_by_row_and_column_half_by_column():
    cos, sin = rotation_table((3, 3), 8)
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


@pytest.mark.parametrize("grid", [(5,), (2, 3, 4)])
def test_rotation_turns_an_equal_part_of_a_head_by_the_place_along_each_axis(grid):
    part = 4  # two pairs, of frequencies 1 and 10000 ** (-1 / 2)
    cos, sin = rotation_table(grid, part * len(grid))
    places = list(product(*map(range, grid)))  # the last axis fastest
    angles = torch.tensor([[p * f for p in place for f in (1, 10000**-0.5)] for place in places])
    torch.testing.assert_close(cos[1:], angles.cos(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sin[1:], angles.sin(), rtol=1e-5, atol=1e-6)
    assert not cos[0].any()
    assert not sin[0].any()


def test_rotation_gives_the_first_axes_what_is_left_of_a_head():
    cos, _ = rotation_table((2, 3, 4), 10)  # five pairs: two, two and one
    t, y, x = 1, 2, 3
    angles = torch.tensor([t * 1.0, t * 0.01, y * 1.0, y * 0.01, x * 1.0])
    torch.testing.assert_close(cos[1 + 12 * t + 4 * y + x], angles.cos())


def test_swiglu_width_is_rounded_up_to_256():
    assert RMSNormBlock(1024, 0.0).feed_forward.w1.out_features == 2816
    assert RMSNormBlock(32, 0.0).feed_forward.w1.out_features == 256


def test_checkpointing_changes_nothing():
    blocks = torch.nn.ModuleList(LayerNormBlock(16) for _ in range(2))
    results = []
    for checkpointing in (False, True):
        x = torch.ones(2, 5, 16, requires_grad=True)
        out = run_blocks(blocks, x, SelfAttention(2, 5), checkpointing)
        grads = torch.autograd.grad(out.square().sum(), [x, *blocks.parameters()])
        results.append([out, *grads])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
