"""The head: the channels of a pixel, each given those before it (paper, 4.1; docs/format.md, "The RGB head").

For RGB these are R, G given R, and B given both, by a softmax over 256 values each. Letters: N pixels, C
channels, V values, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import SelfAttention, full_precision
from models.generator import ForwardOptions
from models.layers import LayerNormBlock, init_weights, run_blocks
from util.pixels import RGB, Alphabet


@dataclass(frozen=True)
class LossTerm:
    """One term of the loss (F3), from one softmax head.

    level  the level whose guiding pixel the head predicts; -1 for the last head, which predicts the pixels
    nll    (N, C): negative log-likelihoods in nats of the channels of the pixels that the head predicts
    loss   a scalar: the weighted mean of `nll`
    """

    level: int
    nll: Tensor
    loss: Tensor

    @property
    def name(self) -> str:
        return last_term(self.nll.shape[1]) if self.level == -1 else f"guiding{self.level}"


def last_term(channels: int) -> str:
    """The name of the last head's term (F3): "rgb", or "cell" where there are not three channels."""
    return "rgb" if channels == 3 else "cell"


class OutputBias(nn.Module):
    """The bias of one channel's logits, whose weight is that of the channel's codebook (F4)."""

    def __init__(self, num_values: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, num_values))


class PixelLoss(nn.Module):
    """A causal transformer over C tokens: the condition, and all channels but the last (F5).

    It uses `conds[0]` only. `r_weight` is the weight of the first channel, R, in the training loss, where
    the others have weight 1. Weights are named after `Alphabet.channel_names`: r_codebook, c0_codebook, ….
    """

    def __init__(
        self, cond_dim: int, embed_dim: int, num_blocks: int, num_heads: int, r_weight: float = 1.0,
        alphabet: Alphabet = RGB,
    ):  # fmt: skip
        super().__init__()
        self.alphabet, self.r_weight, self.num_heads = alphabet, r_weight, num_heads
        num_values, names = alphabet.num_values, alphabet.channel_names
        self.cond_proj = nn.Linear(cond_dim, embed_dim)
        for name in names:
            self.add_module(f"{name}_codebook", nn.Embedding(num_values, embed_dim))
        self.ln = nn.LayerNorm(embed_dim, eps=1e-6)
        self.blocks = nn.ModuleList(LayerNormBlock(embed_dim) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        for name in names:
            self.add_module(f"{name}_mlm", OutputBias(num_values))
        self.apply(init_weights)

    @property
    def codebooks(self) -> list[nn.Embedding]:
        """The vectors (V, D) of each channel's values: inputs, and weights of the logits."""
        return [getattr(self, f"{name}_codebook") for name in self.alphabet.channel_names]

    @property
    def output_layers(self) -> list[tuple[Tensor, Tensor]]:
        """Weights (V, D) and biases (V,) of the logits of each channel, in float32 (F4)."""
        biases = [getattr(self, f"{name}_mlm").bias[0] for name in self.alphabet.channel_names]
        return [(x.weight.float(), bias.float()) for x, bias in zip(self.codebooks, biases, strict=True)]

    def logits(self, values: Tensor, conds: Sequence[Tensor]) -> Tensor:
        """Computes the logits (N, C, V) float32 of each channel given those before it (F4).

        `values` are (N, C) int64, the conditions (N, cond_dim) each. The published head has one more token,
        for the last channel, whose output is not used.
        """
        earlier = zip(self.codebooks[:-1], values.unbind(1), strict=False)
        tokens = [self.cond_proj(conds[0]), *(codebook(value) for codebook, value in earlier)]
        x = self.ln(torch.stack([t.to(tokens[0].dtype) for t in tokens], dim=1))  # (N, C, D)
        x = self.norm(self.run(x))
        with full_precision(x):
            channels = zip(x.float().unbind(1), self.output_layers, strict=True)
            return torch.stack([F.linear(token, *layer) for token, layer in channels], dim=1)

    def run(self, x: Tensor) -> Tensor:
        """Runs the blocks alone on embedded tokens (N, T, D)."""
        return run_blocks(self.blocks, x, SelfAttention(self.num_heads, x.shape[1], causal=True))

    def forward(self, pixels: Tensor, conds: Sequence[Tensor], dither: float = 0.0) -> Tensor:
        """Computes -log p(pixel | c) of (F5) by channel: (N, C) in nats.

        `pixels` are normalised, (N, C), the conditions (N, cond_dim) each; `dither` is as in
        `Alphabet.to_values`.
        """
        values = self.alphabet.to_values(pixels, dither=dither)
        logits = self.logits(values, conds)
        return F.cross_entropy(logits.flatten(0, 1), values.flatten(), reduction="none").view(values.shape)

    def loss_term(
        self, level: int, pixels: Tensor, conds: Sequence[Tensor], train: bool, dither: float = 0.0
    ) -> LossTerm:
        """The loss of normalised pixels (N, C) (docs/format.md, "The RGB head").

        It is the mean over the pixels of the mean over the channels, where in training the first one has the
        weight `r_weight`.
        """
        nll, r_weight = self(pixels, conds, dither), self.r_weight if train else 1.0
        first, *others = nll.mean(0)
        return LossTerm(level, nll, sum(others, r_weight * first) / (r_weight + len(others)))

    def loss_terms(self, images: Tensor, conds: Sequence[Tensor], options: ForwardOptions) -> list[LossTerm]:
        """Ends the recursion (F3): pixels (N, C, 1, …) and their conditions -> the last term."""
        return [self.loss_term(-1, images.flatten(1), conds, options.train)]
