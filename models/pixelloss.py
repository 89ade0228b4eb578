"""The RGB head: R, then G given R, then B given both, each a 256-way softmax (paper section 3.3; SPEC section 4).

Letters: N pixels, D width, h halves (2 with guidance, else 1).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Block, dot_product_attention, full_precision, init_weights, run_blocks
from models.noise import Noise
from models.sampling.guidance import Guidance
from models.sampling.known import KnownPixels
from models.sampling.prepare import Linear, Norm, PreparedBlock, Setup
from util.pixels import NUM_VALUES, normalize, to_values

Weigh = Callable[[int, Tensor], Tensor]


class OutputBias(nn.Module):
    """The bias of one channel's logits, whose weight is tied to the channel's codebook."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, NUM_VALUES))


class PixelLoss(nn.Module):
    """Three-token causal transformer over (condition, R, G). Reads conditions[0] only."""

    def __init__(self, cond_dim: int, embed_dim: int, num_blocks: int, num_heads: int):
        super().__init__()
        self.cond_proj = nn.Linear(cond_dim, embed_dim)
        self.r_codebook = nn.Embedding(NUM_VALUES, embed_dim)
        self.g_codebook = nn.Embedding(NUM_VALUES, embed_dim)
        self.b_codebook = nn.Embedding(NUM_VALUES, embed_dim)
        self.ln = nn.LayerNorm(embed_dim, eps=1e-6)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.r_mlm, self.g_mlm, self.b_mlm = OutputBias(), OutputBias(), OutputBias()
        every_level = torch.arange(NUM_VALUES)[:, None].expand(-1, 3)
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
        levels = to_values(pixels, dither=dither)
        logits = self.logits(levels, conds)
        return F.cross_entropy(logits.flatten(0, 1), levels.flatten(), reduction="none").view(-1, 3)

    def sampler(self, setup: Setup) -> "PixelSampler":
        return PixelSampler(self, setup)


class PixelSampler:
    """Draws pixels channel by channel, in the weights' dtype.

    The condition token attends to itself alone, so its attention is a linear layer. The tokens after it are one of 256
    codes each: the first block's residual, queries, keys and values are rows of a table.
    """

    reads = 1

    def __init__(self, head: PixelLoss, setup: Setup):
        dtype = head.pixel_values.dtype
        dim, self.num_heads = head.norm.normalized_shape[0], head.blocks[0].attn.num_heads
        self.cond_proj, self.ln, self.norm = (
            Linear.of(head.cond_proj, dtype),
            Norm(head.ln, dtype),
            Norm(head.norm, dtype),
        )
        self.blocks = [PreparedBlock(block, dtype) for block in head.blocks]
        self.first_token = []  # of each block: k, v and the change of the residual
        for block in head.blocks:
            w_v, b_v = block.attn.qkv.weight[2 * dim :], block.attn.qkv.bias[2 * dim :]
            weight = torch.cat([block.attn.qkv.weight[dim:], block.attn.proj.weight @ w_v])
            bias = torch.cat([block.attn.qkv.bias[dim:], block.attn.proj(b_v)])
            self.first_token.append(Linear(weight, bias, dtype))
        self.tables = []  # of R and G: residual, q, k, v of every code (256, 4 D)
        for codebook in (head.r_codebook, head.g_codebook):
            x = self.ln(codebook.weight)
            self.tables.append(torch.cat([x, self.blocks[0].qkv(self.blocks[0].norm1(x))], dim=1))
        weights = [
            codebook.weight.float() for codebook in (head.r_codebook, head.g_codebook, head.b_codebook)
        ]
        biases = [mlm.bias[0].float() for mlm in (head.r_mlm, head.g_mlm, head.b_mlm)]
        self.heads = [
            Linear(weight, bias, torch.float32) for weight, bias in zip(weights, biases, strict=True)
        ]
        self.pixel_values, self.dtype = head.pixel_values, dtype
        self.codes = setup.compile(self._codes, self.pixel_values.device)

    def draw(
        self,
        conds,
        guidance: Guidance,
        noise: Noise,
        num_iter_list=(),
        on_step=None,
        given: KnownPixels | None = None,
    ) -> Tensor:
        """Conditions, each (h * N, cond_dim) -> normalised pixels (N, 3, 1, 1). As of a level with no steps of its own."""
        weigh = given.pixel_weights if given is not None and given.constraint is not None else None
        return self.pixels(conds, guidance, noise, weigh)[:, :, None, None]

    def pixels(
        self, conds: Sequence[Tensor], guidance: Guidance, noise: Noise, weigh: Weigh | None = None
    ) -> Tensor:
        """Conditions, each (h * N, cond_dim) -> normalised pixels (N, 3).

        `weigh(channel, levels of the channels before it (N, channel))` gives log-weights (N, 256) of a channel's values.
        """
        cond, uniforms = conds[0].to(self.dtype), noise.colour
        codes = (
            self.codes(cond, guidance, uniforms)
            if weigh is None
            else self._codes(cond, guidance, uniforms, weigh)
        )
        return self.pixel_values.gather(0, codes)

    def _codes(
        self, cond: Tensor, guidance: Guidance, uniforms: Tensor, weigh: Weigh | None = None
    ) -> Tensor:
        """Conditions (h * N, cond_dim), uniforms (N, 3) -> levels (N, 3) int64."""
        x, past = self.ln(self.cond_proj(cond)), []
        for block, first_token in zip(self.blocks, self.first_token, strict=True):
            kv, change = first_token(block.norm1(x)).tensor_split([2 * x.shape[1]], dim=1)
            past.append([kv.unflatten(1, (2, self.num_heads, -1))])  # (h * N, 2, heads, d)
            x = block.mlp(x + change)
        drawn = []

        def pick(x: Tensor) -> None:
            channel = len(drawn)
            logits = self.heads[channel](self.norm(x).float())
            before = (
                torch.stack(drawn, dim=1) if drawn else uniforms.new_empty(len(uniforms), 0, dtype=torch.long)
            )
            weights = weigh(channel, before) if weigh is not None else None
            drawn.append(guidance.pick(guidance.probabilities(logits, weights), uniforms[:, channel]))

        pick(x)
        for table in self.tables:
            x, qkv = table.index_select(0, guidance.double(drawn[-1])).tensor_split([x.shape[1]], dim=1)
            for number, (block, earlier) in enumerate(zip(self.blocks, past, strict=True)):
                if number:
                    qkv = block.qkv(block.norm1(x))
                q, kv = qkv.unflatten(1, (3, self.num_heads, -1)).tensor_split([1], dim=1)
                earlier.append(kv)
                k, v = torch.stack(earlier, dim=3).unbind(1)  # (h * N, heads, t, d)
                x = block.after_attention(x, dot_product_attention(q.transpose(1, 2), k, v).flatten(1))
            pick(x)
        return torch.stack(drawn, dim=1)
