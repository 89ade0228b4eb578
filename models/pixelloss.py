"""The RGB head: R, then G given R, then B given both, each a 256-way softmax (paper section 3.3; SPEC section 4).

Letters: N pixels, D width, h halves (2 with guidance, else 1).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.guidance import Guidance
from models.layers import Block, full_precision, init_weights, make_caches, run_blocks
from models.noise import Noise
from util.pixels import NUM_LEVELS, normalize, to_levels


class OutputBias(nn.Module):
    """The bias of one channel's logits, whose weight is tied to the channel's codebook."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, NUM_LEVELS))


class PixelLoss(nn.Module):
    """Three-token causal transformer over (condition, R, G). Reads conditions[0] only."""

    def __init__(self, cond_dim: int, embed_dim: int, num_blocks: int, num_heads: int):
        super().__init__()
        self.cond_proj = nn.Linear(cond_dim, embed_dim)
        self.r_codebook = nn.Embedding(NUM_LEVELS, embed_dim)
        self.g_codebook = nn.Embedding(NUM_LEVELS, embed_dim)
        self.b_codebook = nn.Embedding(NUM_LEVELS, embed_dim)
        self.ln = nn.LayerNorm(embed_dim, eps=1e-6)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.r_mlm, self.g_mlm, self.b_mlm = OutputBias(), OutputBias(), OutputBias()
        every_level = torch.arange(NUM_LEVELS)[:, None].expand(-1, 3)
        self.register_buffer("pixel_values", normalize(every_level), persistent=False)  # (256, 3)
        self.apply(init_weights)

    def _logits(self, x: Tensor, channel: int) -> Tensor:
        """Output token (N, D) of one channel -> its logits (N, 256), in float32 also under autocast."""
        codebook = (self.r_codebook, self.g_codebook, self.b_codebook)[channel]
        bias = (self.r_mlm, self.g_mlm, self.b_mlm)[channel].bias
        with full_precision(x):
            return x.float() @ codebook.weight.float().T + bias.float()

    def logits(self, levels: Tensor, conds: Sequence[Tensor]) -> Tensor:
        """Levels (N, 3) int64 and conditions -> logits (N, 3, 256) float32 of R, of G given R, of B given R and G.

        The published head feeds B as a fourth token, whose output nothing reads.
        """
        tokens = [self.cond_proj(conds[0]), self.r_codebook(levels[:, 0]), self.g_codebook(levels[:, 1])]
        x = self.ln(torch.stack([t.to(tokens[0].dtype) for t in tokens], dim=1))  # (N, 3, D)
        x = self.norm(self.run(x))
        return torch.stack([self._logits(x[:, channel], channel) for channel in range(3)], dim=1)

    def run(self, x: Tensor) -> Tensor:
        """The blocks alone, on embedded tokens (N, T, D)."""
        return run_blocks(self.blocks, x, True)

    def forward(self, pixels: Tensor, conds: Sequence[Tensor], dither: float = 0.0) -> Tensor:
        """Normalised pixels (N, 3) and conditions, each (N, cond_dim) -> negative log-likelihoods (N, 3) in nats."""
        levels = to_levels(pixels, dither=dither)
        logits = self.logits(levels, conds)
        return F.cross_entropy(logits.flatten(0, 1), levels.flatten(), reduction="none").view(-1, 3)

    def draw(self, conds: Sequence[Tensor], guidance: Guidance, noise: Noise, num_iter_list: Sequence[int] = ()) -> Tensor:
        """Conditions, each (h * N, cond_dim) -> normalised pixels (N, 3, 1, 1), drawn channel by channel."""
        x = self.cond_proj(conds[0])  # (h * N, D)
        caches = make_caches(self.blocks, self.blocks[0].attn.num_heads, 3, x)
        uniforms = noise.colour
        drawn = []
        for channel, codebook in enumerate((self.r_codebook, self.g_codebook, None)):
            out = self.norm(run_blocks(self.blocks, self.ln(x)[:, None], False, caches=caches))
            logits = self._logits(out.squeeze(1), channel)
            drawn.append(guidance.pick(guidance.probabilities(logits), uniforms[:, channel]))  # (N,)
            if codebook is not None:
                x = guidance.double(codebook(drawn[-1]))
        return self.pixel_values.gather(0, torch.stack(drawn, dim=1))[:, :, None, None]
