"""Sampling of pixels, channel by channel, in the weights' dtype (docs/format.md, "The RGB head", "Sampling").

Letters: N pixels, C channels, V values, D width, h halves (2 with guidance, otherwise 1), t tokens so far.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import dot_product_attention
from models.layers import LayerNormBlock
from models.noise import Noise
from models.pixelloss import PixelLoss
from models.sampling.canvas import Batch, Sampler
from models.sampling.guidance import Guidance
from models.sampling.prepare import FastLayerNorm, FastLinear, Setup, prepare_block

# Called with the number of a channel and the values (N, channel) of the channels before it; returns
# log-weights (N, V), which are added to the logits.
Weigh = Callable[[int, Tensor], Tensor]


class PixelSampler(Sampler):
    """Samples pixels channel by channel (F5).

    The tokens after the condition are one of V codes each, so the first block's input and its queries, keys
    and values are rows of a table (`tables`), computed once. On one CPU core that made a head of two
    blocks 5% faster (docs/log.md).
    """

    num_conds = 1

    def __init__(self, head: PixelLoss, setup: Setup, axes: int = 2):
        alphabet, dtype, device = head.alphabet, head.ln.weight.dtype, head.ln.weight.device
        self.patch_size, self.num_heads, self.dtype = (1,) * axes, head.num_heads, dtype
        # The tables have one more row, for the value of a pixel whose probabilities are not finite.
        every_value = torch.arange(alphabet.num_values, device=device)[:, None].expand(-1, alphabet.channels)
        normalised = alphabet.normalize(every_value)
        self.pixel_values = F.pad(normalised, (0, 0, 0, 1), value=torch.nan)  # (V + 1, C)
        self.cond_proj = FastLinear.of(head.cond_proj, dtype)
        self.ln, self.norm = FastLayerNorm(head.ln, dtype), FastLayerNorm(head.norm, dtype)
        self.blocks = [prepare_block(block, dtype) for block in head.blocks]
        self.first_token = [first_token(block, dtype) for block in head.blocks]
        self.outputs = [FastLinear(*layer, torch.float32) for layer in head.output_layers]
        # for all channels but the last: the input, queries, keys and values of every code in the first block,
        # (V + 1, 4 D)
        self.tables = []
        for codebook in head.codebooks[:-1]:
            x, first = self.ln(codebook.weight), self.blocks[0]
            table = torch.cat([x, *first.qkv(first.norm1(x))], dim=1)
            self.tables.append(F.pad(table, (0, 0, 0, 1), value=torch.nan))
        self.compiled = setup.compile(PixelSampler._pixels, self.pixel_values.device)

    def plan(self, num_iters: Sequence[int], hidden: int | None = None) -> tuple:
        return ()

    def draw(self, batch: Batch, plan: tuple) -> Tensor:
        constrained = batch.known is not None and batch.known.constraint is not None
        weigh = batch.known.pixel_weights if constrained else None
        return self.pixels(batch.conds, batch.guidance, batch.noise, weigh)[
            (..., *[None] * len(self.patch_size))
        ]

    def pixels(
        self, conds: Sequence[Tensor], guidance: Guidance, noise: Noise, weigh: Weigh | None = None
    ) -> Tensor:
        """Samples normalised pixels (N, C) (F5), given conditions, each (h * N, cond_dim).

        `weigh` adds log-weights to the logits; None: no weights. Pixels whose probabilities are not finite
        are NaN.
        """
        cond, uniforms = conds[0].to(self.dtype), noise.value_uniforms
        if weigh is None:
            return self.compiled(self, cond, guidance, uniforms)
        return self._pixels(cond, guidance, uniforms, weigh)

    def _pixels(
        self, cond: Tensor, guidance: Guidance, uniforms: Tensor, weigh: Weigh | None = None
    ) -> Tensor:
        """Samples pixels (N, C) as `pixels`, given conditions (h * N, cond_dim) and uniforms (N, C)."""
        # for each block: the keys and values, (h * N, 2, heads, d), of the tokens so far
        past = [[] for _ in self.blocks]
        x, values, probs = self.ln(self.cond_proj(cond)), [], []
        for block, first, earlier in zip(self.blocks, self.first_token, past, strict=True):
            kv, change = first(block.norm1(x)).tensor_split([2 * x.shape[1]], dim=1)
            earlier.append(kv.unflatten(1, (2, self.num_heads, -1)))
            x = x + change
            x = block.feed_forward(block.norm2(x), x)
        for channel, output in enumerate(self.outputs):
            logits = output(self.norm(x).float())
            weights = None
            if weigh is not None:
                weights = weigh(channel, torch.stack(values, dim=1) if values else uniforms[:, :0].long())
            probs.append(guidance.probabilities(logits, weights))
            values.append(guidance.pick(probs[-1], uniforms[:, channel]))
            if weights is not None:  # where nothing can be drawn, a value that the next weights can follow
                values[-1] = torch.where(probs[-1][:, 0] >= 0, values[-1], weights.argmax(-1))
            if channel == len(self.tables):
                break
            row = self.tables[channel].index_select(0, guidance.double(values[-1]))
            x, qkv = row.tensor_split([x.shape[1]], dim=1)
            x = self.blocks[0].after_attention(x, self.attend(past[0], qkv))
            for block, earlier in zip(self.blocks[1:], past[1:], strict=True):
                x = block.forward(x, partial(self.attend, earlier))
        pixels = self.pixel_values.gather(0, torch.stack(values, dim=1))
        # A softmax that is not finite is NaN everywhere, so adding 0 times its first probability marks the
        # pixel, without a wait of the host and whatever `pick` returned.
        return pixels.add_(torch.cat([row[:, :1] for row in probs], dim=1), alpha=0)

    def attend(self, earlier: list[Tensor], qkv: Tensor) -> Tensor:
        """Attention of one token (h * N, 3 D) to itself and to the `earlier` tokens.

        It adds the token's keys and values to `earlier`, a list of (h * N, 2, heads, d).
        """
        q, kv = qkv.unflatten(1, (3, self.num_heads, -1)).tensor_split([1], dim=1)
        earlier.append(kv)
        k, v = torch.stack(earlier, dim=3).unbind(1)  # (h * N, heads, t, d)
        return dot_product_attention(q.transpose(1, 2), k, v).flatten(1)


def first_token(block: LayerNormBlock, dtype: torch.dtype) -> FastLinear:
    """The attention of a token that sees only itself, as one layer (docs/format.md, "The RGB head").

    The layer takes the token after the norm, and gives keys, values, and what is added to the residual
    stream. The weighted mean of one value is that value, so the projections of values and outputs are one
    product.
    """
    qkv, proj, dim = block.attn.qkv, block.attn.proj, block.attn.qkv.in_features
    (w_kv, w_v), (b_kv, b_v) = ((p[dim:], p[2 * dim :]) for p in (qkv.weight, qkv.bias))
    weight = torch.cat([w_kv, proj.weight @ w_v])
    return FastLinear(weight, torch.cat([b_kv, F.linear(b_v, proj.weight, proj.bias)]), dtype)
