"""Attention, once, and the two thin blocks that the published weight names force.

Letters: N sequences, T tokens, D width, h heads, d = D / h.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.rope import rotate

SHORT = 4  # tokens; the RGB head has three


class KVCache:
    """Keys and values of the tokens seen so far, in buffers of fixed size. Belongs to one sampling call."""

    def __init__(self, n: int, num_heads: int, max_tokens: int, head_dim: int, like: Tensor):
        self.k = like.new_empty(n, num_heads, max_tokens, head_dim)
        self.v = torch.empty_like(self.k)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (N, h, t, d) of new tokens -> those of all tokens so far (N, h, length, d)."""
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


def attend(x, to_qkv, to_out, num_heads, *, causal=False, rotation=None, cache=None, dropout=0.0):
    """Multi-head self-attention (N, T, D) -> (N, T, D).

    rotation: (cos, sin) of these T tokens, applied to q and k. cache: earlier tokens, which all T tokens may see;
    T must then be 1. dropout: probability on the attention weights.
    """
    q, k, v = to_qkv(x).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3 of (N, h, T, d)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    if cache is not None:
        assert x.shape[1] == 1, "with a cache, tokens come one at a time"
        k, v = cache.append(k, v)
        causal = False
    if x.shape[1] <= SHORT and not dropout:
        out = plain_attention(q, k, v, causal)
    else:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
    return to_out(out.transpose(1, 2).flatten(2))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q kT / sqrt(d)) v, for (N, h, T, d) of few tokens, where a fused kernel costs more than it saves."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (N, h, T, T)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores.float().softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, attn_dropout: float, proj_dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.attn_dropout = attn_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_dropout)

    def forward(self, x: Tensor, causal: bool = False, cache: KVCache | None = None) -> Tensor:
        dropout = self.attn_dropout if self.training else 0.0
        return self.proj_drop(attend(x, self.qkv, self.proj, self.num_heads, causal=causal, cache=cache, dropout=dropout))


class Mlp(nn.Module):
    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.drop = nn.Dropout(dropout)

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

    def forward(self, x: Tensor, causal: bool = False, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), causal, cache)
        return x + self.mlp(self.norm2(x))


class RotaryAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache | None = None) -> Tensor:
        return self.drop(attend(x, self.wqkv, self.wo, self.num_heads, causal=True, rotation=rotation, cache=cache))


class SwiGLU(nn.Module):
    def __init__(self, dim: int, dropout: float):
        super().__init__()
        hidden = -(-int(8 * dim / 3) // 256) * 256
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class RotaryBlock(nn.Module):
    """Pre-RMSNorm causal block of AR, with 2-D rotary positions and SwiGLU."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.attention = RotaryAttention(dim, num_heads, dropout)
        self.feed_forward = SwiGLU(dim, dropout)
        self.attention_norm = RMSNorm(dim, eps=1e-5)
        self.ffn_norm = RMSNorm(dim, eps=1e-5)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class RMSNorm(nn.RMSNorm):
    """RMSNorm computed in float32, whatever the input (SPEC section 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, eps=self.eps).type_as(x) * self.weight


def make_caches(blocks: nn.ModuleList, num_heads: int, max_tokens: int, like: Tensor) -> list[KVCache]:
    """A cache for each block, for sequences like `like` (N, D): its device, and its dtype (under autocast that of a linear
    layer's output, so that keys and values fit)."""
    n, dim = like.shape
    return [KVCache(n, num_heads, max_tokens, dim // num_heads, like) for _ in blocks]


def run_blocks(
    blocks: nn.ModuleList, x: Tensor, *args, caches: Sequence[KVCache] | None = None, checkpointing: bool = False
) -> Tensor:
    """The blocks in turn; with `checkpointing`, activations inside a block are computed again in the backward pass."""
    for number, block in enumerate(blocks):
        if caches is not None:
            x = block(x, *args, caches[number])
        elif checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, *args, use_reentrant=False)
        else:
            x = block(x, *args)
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
