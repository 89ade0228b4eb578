"""The transformer block: its arithmetic is written only here; sampling replaces its layers.

Letters: N sequences, T tokens of each, M = N * T rows, R some of these rows, D width.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.generator import LevelSpec
from models.recompute import Dropout, RMSNorm, swiglu

MAX_TABLE_WIDTH = 32  # of the vector of a categorical value


class QKV(nn.Linear):
    """One linear layer for queries, keys and values, in this order (docs/format.md, "Weight names")."""

    def __init__(self, dim: int, bias: bool = True):
        super().__init__(dim, 3 * dim, bias=bias)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, ...]:
        """Projects tokens (M, D) and returns a tuple of one or two tensors.

        Without `rows`: (M, 3 D), the queries, keys and values. With `rows` (R,) int64: the queries of these
        rows, (R, D), and the keys and values of all rows, (M, 2 D).
        """
        if rows is None:
            return (super().forward(x),)
        sizes = [self.in_features, 2 * self.in_features]
        biases = (None, None) if self.bias is None else self.bias.split(sizes)
        weights = self.weight.split(sizes)
        return F.linear(x[rows], weights[0], biases[0]), F.linear(x, weights[1], biases[1])


class PatchEmbedding(nn.Linear):
    """Embeds patches (..., C * P) of normalised values by one linear layer: (..., D).

    See docs/format.md, "Values". Where values are categorical, the layer takes a learned vector for each of
    them: row `c * V + value` of `table` (C * V, E) for a value of channel c.
    """

    def __init__(self, spec: LevelSpec):
        self.alphabet, num_values = spec.alphabet, spec.alphabet.num_values
        width = 1 if self.alphabet.is_ordinal else min(num_values, MAX_TABLE_WIDTH)
        super().__init__(spec.patch_dim * width, spec.embed_dim)
        if not self.alphabet.is_ordinal:
            self.table = nn.Embedding(self.alphabet.channels * num_values, width)
            first_row = torch.arange(self.alphabet.channels)[:, None] * num_values
            self.register_buffer("first_row", first_row, persistent=False)  # (C, 1)

    def inputs(self, patches: Tensor) -> Tensor:
        """What the linear layer takes: the patches themselves, or the vectors of their values."""
        if self.alphabet.is_ordinal:
            return patches
        # A sampler's cells are NaN where its probabilities are not finite; they are refused at its end.
        cells = patches.nan_to_num().unflatten(-1, (self.alphabet.channels, -1))
        return self.table(self.alphabet.to_values(cells, dim=-2) + self.first_row).flatten(-3)

    def forward(self, patches: Tensor) -> Tensor:
        return super().forward(self.inputs(patches).to(self.weight.dtype))


class ResidualLinear(nn.Linear):
    """A linear layer with dropout, added to the residual stream (docs/format.md, "MAR levels")."""

    def __init__(self, in_features: int, out_features: int, dropout: float, bias: bool = True):
        super().__init__(in_features, out_features, bias=bias)
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self.drop(super().forward(x))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them (docs/format.md, "MAR levels").

    The result is added to the residual stream.
    """

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = ResidualLinear(4 * dim, dim, dropout)
        self.drop = Dropout(dropout)

    def hidden(self, x: Tensor) -> Tensor:
        """Computes the activations between the two layers: (M, D) -> (M, 4 D)."""
        return self.drop(F.gelu(self.fc1(x)))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.fc2(self.hidden(x), residual)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) (docs/format.md, "AR levels"; Shazeer 2020, arXiv 2002.05202).

    The result is added to the residual stream.
    """

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        hidden = -(-int(8 * dim / 3) // 256) * 256
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = ResidualLinear(hidden, dim, dropout, bias=False)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Computes w1 x and w3 x for tokens x (M, D)."""
        return self.w1(x), self.w3(x)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.w2(swiglu(*self.gates(x)), residual)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + feed_forward(norm(x)) (paper, 4.1).

    A subclass gives `norm1`, `qkv`, `proj`, `norm2` and `feed_forward`, and names their weights as in
    docs/format.md, "Weight names".
    """

    def forward(self, x: Tensor, attend: Callable[..., Tensor], rows: Tensor | None = None) -> Tensor:
        """Tokens (M, D) -> tokens (M, D); with `rows` (R,) int64 only the outputs of these rows, (R, D).

        `attend` takes what `QKV.forward` returns and gives the weighted values of each query.
        """
        projected = self.qkv(self.norm1(x), rows)
        return self.after_attention(x if rows is None else x[rows], attend(*projected))

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """Computes the rest of the block from its input (M, D) and the output of its attention (M, D)."""
        x = self.proj(attended, x)
        return self.feed_forward(self.norm2(x), x)


class LayerNormBlock(Block):
    """The block with LayerNorm, biases and GELU (docs/format.md, "MAR levels" and "The RGB head")."""

    def __init__(self, dim: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.Module()
        self.attn.qkv = QKV(dim)
        self.attn.proj = ResidualLinear(dim, dim, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, dropout)

    qkv = property(lambda self: self.attn.qkv)
    proj = property(lambda self: self.attn.proj)
    feed_forward = property(lambda self: self.mlp)


class RMSNormBlock(Block):
    """The block of AR levels (docs/format.md, "AR levels"): RMSNorm, no biases and SwiGLU."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.attention = nn.Module()
        self.attention.wqkv = QKV(dim, bias=False)
        self.attention.wo = ResidualLinear(dim, dim, dropout, bias=False)
        self.feed_forward = SwiGLU(dim, dropout)
        self.attention_norm = RMSNorm(dim, eps=1e-5)
        self.ffn_norm = RMSNorm(dim, eps=1e-5)

    norm1 = property(lambda self: self.attention_norm)
    norm2 = property(lambda self: self.ffn_norm)
    qkv = property(lambda self: self.attention.wqkv)
    proj = property(lambda self: self.attention.wo)


def run_blocks(blocks: Iterable[Block], x: Tensor, attend: Callable, checkpointing: bool = False) -> Tensor:
    """Runs the blocks (paper, 4.1) one after the other on tokens (N, T, D) and returns tokens of that shape.

    `attend` is as in `Block.forward`. With `checkpointing` the activations inside a block are not kept; the
    backward pass computes them again.
    """
    shape, x = x.shape, x.flatten(0, 1)
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, attend, use_reentrant=False)
        else:
            x = block(x, attend)
    return x.view(shape)


def init_weights(module: nn.Module) -> None:
    """Initialises linear layers Xavier-uniform with biases 0, and embeddings from N(0, 0.02 ** 2).

    Norms keep torch's initial weights, and the vectors of categorical values torch's N(0, 1): they take the
    place of normalised numbers. It is called by `Module.apply`.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, PatchEmbedding) and not module.alphabet.is_ordinal:
            module.table.reset_parameters()
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
