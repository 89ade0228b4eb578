"""The RGB head: R, then G given R, then B given both (paper, 4.1; docs/format.md, "The RGB head").

Each is predicted by a softmax over 256 values. Letters: N pixels, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import SelfAttention, full_precision
from models.generator import ForwardOptions
from models.layers import LayerNormBlock, init_weights, run_blocks
from util.pixels import NUM_VALUES, normalize, to_values


@dataclass(frozen=True)
class LossTerm:
    """One term of the loss (F3), from one softmax head.

    level  the level whose guiding pixel the head predicts; -1 for the RGB head, which predicts the pixels
    nll    (N, 3): negative log-likelihoods in nats of R, G and B of the pixels that the head predicts
    loss   a scalar: the weighted mean of `nll`
    """

    level: int
    nll: Tensor
    loss: Tensor

    @property
    def name(self) -> str:
        return "rgb" if self.level == -1 else f"guiding{self.level}"


class OutputBias(nn.Module):
    """The bias of one channel's logits, whose weight is that of the channel's codebook (F4)."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, NUM_VALUES))


class PixelLoss(nn.Module):
    """A causal transformer over three tokens: the condition, R and G (F5). It uses `conds[0]` only.

    `r_weight` is the weight of R in the training loss, where G and B have weight 1.
    """

    def __init__(self, cond_dim: int, embed_dim: int, num_blocks: int, num_heads: int, r_weight: float = 1.0):
        super().__init__()
        self.r_weight, self.num_heads = r_weight, num_heads
        self.cond_proj = nn.Linear(cond_dim, embed_dim)
        self.r_codebook = nn.Embedding(NUM_VALUES, embed_dim)
        self.g_codebook = nn.Embedding(NUM_VALUES, embed_dim)
        self.b_codebook = nn.Embedding(NUM_VALUES, embed_dim)
        self.ln = nn.LayerNorm(embed_dim, eps=1e-6)
        self.blocks = nn.ModuleList(LayerNormBlock(embed_dim) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.r_mlm, self.g_mlm, self.b_mlm = OutputBias(), OutputBias(), OutputBias()
        every_value = torch.arange(NUM_VALUES)[:, None].expand(-1, 3)
        self.register_buffer("pixel_values", normalize(every_value), persistent=False)  # (256, 3)
        self.apply(init_weights)

    @property
    def output_layers(self) -> list[tuple[Tensor, Tensor]]:
        """Weights (256, D) and biases (256,) of the logits of R, G and B, in float32 (F4)."""
        books, biases = (
            (self.r_codebook, self.g_codebook, self.b_codebook),
            (self.r_mlm, self.g_mlm, self.b_mlm),
        )
        return [(book.weight.float(), mlm.bias[0].float()) for book, mlm in zip(books, biases, strict=True)]

    def logits(self, values: Tensor, conds: Sequence[Tensor]) -> Tensor:
        """Computes the logits (N, 3, 256) float32 of R, of G given R, and of B given R and G (F4).

        `values` are (N, 3) int64 from 0 to 255, the conditions (N, cond_dim) each. The published head has a
        fourth token, for B, whose output is not used.
        """
        tokens = [self.cond_proj(conds[0]), self.r_codebook(values[:, 0]), self.g_codebook(values[:, 1])]
        x = self.ln(torch.stack([t.to(tokens[0].dtype) for t in tokens], dim=1))  # (N, 3, D)
        x = self.norm(self.run(x))
        with full_precision(x):
            channels = zip(x.float().unbind(1), self.output_layers, strict=True)
            return torch.stack([F.linear(token, *layer) for token, layer in channels], dim=1)

    def run(self, x: Tensor) -> Tensor:
        """Runs the blocks alone on embedded tokens (N, T, D)."""
        return run_blocks(self.blocks, x, SelfAttention(self.num_heads, x.shape[1], causal=True))

    def forward(self, pixels: Tensor, conds: Sequence[Tensor], dither: float = 0.0) -> Tensor:
        """Computes -log p(R, G, B | c) of (F5) by channel: (N, 3) in nats.

        `pixels` are normalised, (N, 3), the conditions (N, cond_dim) each; `dither` is as in `to_values`.
        """
        values = to_values(pixels, dither=dither)
        logits = self.logits(values, conds)
        return F.cross_entropy(logits.flatten(0, 1), values.flatten(), reduction="none").view(-1, 3)

    def loss_term(
        self, level: int, pixels: Tensor, conds: Sequence[Tensor], train: bool, dither: float = 0.0
    ) -> LossTerm:
        """The loss of normalised pixels (N, 3) (docs/format.md, "The RGB head").

        It is the mean over the pixels of the mean over R, G and B, which in training is weighted by
        `r_weight`, 1 and 1.
        """
        nll, r_weight = self(pixels, conds, dither), self.r_weight if train else 1.0
        red, green, blue = nll.mean(0)
        return LossTerm(level, nll, (r_weight * red + green + blue) / (r_weight + 2))

    def loss_terms(self, images: Tensor, conds: Sequence[Tensor], options: ForwardOptions) -> list[LossTerm]:
        """Ends the recursion (F3): pixels (N, 3, 1, 1) and their conditions -> the term "rgb"."""
        return [self.loss_term(-1, images.flatten(1), conds, options.train)]
