"""Attention and rotary positions: training, likelihoods and sampling all use this arithmetic (paper, 4.1).

Letters: N sequences, T tokens of each, S keys, R rows (some of the N * T tokens), D width, h heads, d = D / h
width of a head, L patches of an image.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.recompute import Dropout

MAX_SHORT_TOKENS = 4  # up to here sequences are short, as are the three tokens of the head for RGB
MIN_MANY_SEQUENCES = 64  # above it, plain products are faster for short sequences on a CPU
MIN_LONG_TOKENS = 128  # from here on a CPU's fused kernel takes twice as long as plain products in bfloat16


@dataclass(frozen=True)
class SelfAttention:
    """Attention within sequences of `num_tokens` tokens (docs/format.md, "AR levels" and "MAR levels").

    causal    True: a token sees itself and the tokens before it; False: it sees all tokens
    rotation  cos and sin, each (T, d / 2), by which queries and keys are turned; None: no rotation
    dropout   the dropout of the attention weights; None: no dropout

    A call takes what `QKV.forward` returns and gives the weighted values of each query, (N * T, D) or (R, D).
    """

    num_heads: int
    num_tokens: int
    causal: bool = False
    rotation: tuple[Tensor, Tensor] | None = None
    dropout: Dropout | None = None

    def __call__(self, *projected: Tensor) -> Tensor:
        q, k, v = split_heads(projected, projected[-1].shape[0] // self.num_tokens, self.num_heads)
        if self.rotation is not None:
            q, k = rotate(q, self.rotation), rotate(k, self.rotation)
        return merge_heads(dot_product_attention(q, k, v, causal=self.causal, dropout=self.dropout))


def split_heads(projected: Sequence[Tensor], num_sequences: int, num_heads: int) -> tuple[Tensor, ...]:
    """Splits what `QKV.forward` returns into heads (docs/format.md, "Weight names": the order of the parts).

    Returns queries (N, h, T, d), or (N, h, R / N, d) where QKV got R rows, and keys and values, each
    (N, h, T, d).
    """
    if len(projected) == 1:
        return _split(projected[0], num_sequences, num_heads, 3)
    queries, others = projected
    return *_split(queries, num_sequences, num_heads, 1), *_split(others, num_sequences, num_heads, 2)


def _split(x: Tensor, num_sequences: int, num_heads: int, parts: int) -> tuple[Tensor, ...]:
    """Splits (N * T, parts * D) into a tuple of `parts` tensors, each (N, h, T, d)."""
    x = x.view(num_sequences, -1, parts, num_heads, x.shape[1] // parts // num_heads)
    return x.permute(2, 0, 3, 1, 4).unbind(0)


def merge_heads(x: Tensor) -> Tensor:
    """Joins the heads, the inverse of the splitting: (N, h, T, d) -> (N * T, D) (paper, 4.1)."""
    return x.transpose(1, 2).reshape(-1, x.shape[1] * x.shape[3])


def dot_product_attention(q, k, v, *, causal: bool = False, dropout: Dropout | None = None) -> Tensor:
    """Computes softmax(q kT / sqrt(d)) v, the attention of all levels (paper, 4.1).

    Queries are (N, h, T, d), keys and values (N, h, S, d), and the result is (N, h, T, d). It uses torch's
    fused kernel, except in the cases where plain products measured faster.
    """
    probability = dropout.p if dropout is not None and dropout.training else 0.0
    if not plain_is_faster(q, k.shape[2], probability):
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
            # The backward pass of the fused kernel takes 6 times as long in bfloat16 on a CPU.
            with full_precision(q):
                return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal).to(
                    v.dtype
                )
        return F.scaled_dot_product_attention(q, k, v, dropout_p=probability, is_causal=causal)
    return plain_attention(q, k, v, causal, dropout if probability else None)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: Dropout | None = None) -> Tensor:
    """Computes `dot_product_attention` (paper, 4.1) by matrix products and a float32 softmax."""
    scale = q.shape[-1] ** -0.5
    if q.shape[2] == 1 and k.shape[2] <= MAX_SHORT_TOKENS and dropout is None:
        weights = (q * scale * k).sum(-1).float().softmax(-1).to(v.dtype)  # (N, h, S)
        return (weights[..., None] * v).sum(2, keepdim=True)
    if q.dtype == torch.float16:
        # The queries are scaled before the product, because in float16 it might overflow.
        scores = q * scale @ k.transpose(-1, -2)  # (N, h, T, S)
    else:
        # Here the product is scaled, so that the backward pass does not keep a second copy of the queries.
        scores = (q @ k.transpose(-1, -2)).mul_(scale)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    weights = scores.float().softmax(-1).to(v.dtype)
    return weights @ v if dropout is None else dropout.product(weights, v)


def plain_is_faster(q: Tensor, num_keys: int, dropout: float) -> bool:
    """Says whether plain products measured faster than the fused kernel for the attention (paper, 4.1).

    `q` are queries (N, h, T, d), `num_keys` is S, and `dropout` is the probability of dropping a weight.
    """
    n, _, tokens, _ = q.shape
    on_cpu, training = q.device.type == "cpu", torch.is_grad_enabled()
    if dropout:
        return on_cpu or q.is_meta  # the CPU's fused kernel has no dropout
    if num_keys <= MAX_SHORT_TOKENS:
        return training or (on_cpu and n > MIN_MANY_SEQUENCES)
    return (
        on_cpu and not training and tokens > 1 and num_keys >= MIN_LONG_TOKENS and q.dtype == torch.bfloat16
    )


def rotation_table(grid: Sequence[int], head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of rotary positions (Su et al. 2021, arXiv 2104.09864), each (1 + L, d / 2) float32.

    Row 0 is the condition token's and is zero, which makes its queries and keys zero vectors (docs/format.md,
    "AR levels"). Each axis of the grid has a part of a head, h numbers, which turns with the patch's place
    along it: pair i of a part turns by 10000 ** (-2 i / h) radians per patch. The parts are equal, or the
    first ones have one more pair.
    """
    places = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in grid), indexing="ij")
    angles = []
    for place, pairs in zip(places, torch.arange(head_dim // 2).tensor_split(len(grid)), strict=True):
        part = 2 * len(pairs)
        frequencies = 10000.0 ** (-torch.arange(0, part, 2, dtype=torch.float32) / part)  # (h / 2,)
        angles.append(place.reshape(-1, 1) * frequencies)
    patches = torch.cat(angles, dim=1)  # (L, d / 2)
    condition = torch.zeros(1, head_dim // 2)
    return torch.cat([condition, patches.cos()]), torch.cat([condition, patches.sin()])


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns neighbouring pairs (0, 1), (2, 3), … of x (N, h, T, d) (docs/format.md, "AR levels").

    `rotation` holds cos and sin of the angles, each (T, d / 2). The arithmetic is float32, the result has x's
    dtype.
    """
    cos, sin = rotation
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler writes no kernels for complex numbers
        even, odd = pairs.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos.float(), sin.float()))
    return turned.flatten(-2).type_as(x)


def rotate_(qkv: Tensor, rotation: Tensor) -> Tensor:
    """Turns queries and keys as `rotate` does, but in place (docs/format.md, "AR levels").

    `qkv` is (N, T, 3, h, d) float32, `rotation` the complex numbers cos + i sin, (T, 1, 1, d / 2).
    """
    torch.view_as_complex(qkv[:, :, :2].unflatten(-1, (-1, 2))).mul_(rotation)
    return qkv


def full_precision(x: Tensor) -> AbstractContextManager:
    """Context manager that turns autocast off on the device of `x`, if that device has autocast.

    The float32 logits of docs/format.md, "The RGB head", need it.
    """
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
