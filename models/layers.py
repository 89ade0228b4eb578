"""Attention, once, and the two thin blocks that the published weight names force.

Letters: N sequences, T tokens, D width, h heads, d = D / h.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.recompute import Dropout, RMSNorm, swiglu
from models.rope import rotate

SHORT = 4  # tokens; the RGB head has three
MANY = 64  # sequences
LONG = 128  # tokens; from here on a CPU's fused kernel takes twice as long as plain products in bfloat16


def attend(x, to_qkv, to_out, num_heads, *, causal=False, rotation=None, dropout=None):
    """Multi-head self-attention (N, T, D) -> (N, T, D).

    rotation: (cos, sin) of these T tokens, applied to q and k. dropout: a Dropout for the attention weights.
    """
    q, k, v = to_qkv(x).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3 of (N, h, T, d)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    return to_out(dot_product_attention(q, k, v, causal=causal, dropout=dropout).transpose(1, 2).flatten(2))


def dot_product_attention(q, k, v, *, causal: bool = False, dropout: Dropout | None = None) -> Tensor:
    """softmax(q kT / sqrt(d)) v: queries (N, h, T, d), keys and values (N, h, S, d) -> (N, h, T, d).

    By the fused kernel, but for the cases in which plain products measured faster.
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
    """The same, by products and a float32 softmax."""
    scale = q.shape[-1] ** -0.5
    if q.shape[2] == 1 and k.shape[2] <= SHORT and dropout is None:
        weights = (q * scale * k).sum(-1).float().softmax(-1).to(v.dtype)  # (N, h, S)
        return (weights[..., None] * v).sum(2, keepdim=True)
    if q.dtype == torch.float16:
        scores = q * scale @ k.transpose(-1, -2)  # (N, h, T, S); before the product, which might overflow
    else:
        scores = (q @ k.transpose(-1, -2)).mul_(
            scale
        )  # after it, so that no second q is kept for the backward pass
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    weights = scores.float().softmax(-1).to(v.dtype)
    return weights @ v if dropout is None else dropout.product(weights, v)


def plain_is_faster(q: Tensor, length: int, dropout: float) -> bool:
    """Whether plain products beat the fused kernel, for queries (N, h, T, d) and `length` keys."""
    n, _, tokens, _ = q.shape
    on_cpu, training = q.device.type == "cpu", torch.is_grad_enabled()
    if dropout:
        return on_cpu  # whose fused kernel knows no dropout
    if length <= SHORT:
        return training or (on_cpu and n > MANY)
    return on_cpu and not training and tokens > 1 and length >= LONG and q.dtype == torch.bfloat16


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, attn_dropout: float, proj_dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = Dropout(attn_dropout)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = Dropout(proj_dropout)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        return self.proj_drop(
            attend(x, self.qkv, self.proj, self.num_heads, causal=causal, dropout=self.attn_drop)
        )


class Mlp(nn.Module):
    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Pre-LayerNorm transformer block of MAR and of the RGB head."""

    def __init__(self, dim: int, num_heads: int, attn_dropout: float = 0.0, proj_dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, attn_dropout, proj_dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, proj_dropout)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        x = x + self.attn(self.norm1(x), causal)
        return x + self.mlp(self.norm2(x))


class RotaryAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        return self.drop(attend(x, self.wqkv, self.wo, self.num_heads, causal=True, rotation=rotation))


class SwiGLU(nn.Module):
    def __init__(self, dim: int, dropout: float):
        super().__init__()
        hidden = -(-int(8 * dim / 3) // 256) * 256
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.w2(swiglu(self.w1(x), self.w3(x))))


class RotaryBlock(nn.Module):
    """Pre-RMSNorm causal block of AR, with 2-D rotary positions and SwiGLU."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.attention = RotaryAttention(dim, num_heads, dropout)
        self.feed_forward = SwiGLU(dim, dropout)
        self.attention_norm = RMSNorm(dim, eps=1e-5)
        self.ffn_norm = RMSNorm(dim, eps=1e-5)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.feed_forward(self.ffn_norm(x))


def run_blocks(blocks: nn.ModuleList, x: Tensor, *args, checkpointing: bool = False) -> Tensor:
    """The blocks in turn; with `checkpointing`, activations inside a block are computed again in the backward pass."""
    for block in blocks:
        x = (
            checkpoint(block, x, *args, use_reentrant=False)
            if checkpointing and torch.is_grad_enabled()
            else block(x, *args)
        )
    return x


def full_precision(x: Tensor) -> AbstractContextManager:
    """Inside it autocast is off on the device of `x`, where that device has autocast at all."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform linear layers, N(0, 0.02) embeddings, norms at one. For `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
