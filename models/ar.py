"""AR: patches in raster order, each given all before it (paper section 3.2; SPEC section 3).

Letters: N images, L patches, C = 3 * p * p, D width, h halves (2 with guidance, else 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.generator import ForwardOptions, Generator, LevelOutput, LevelSpec, register_generator
from models.layers import RotaryBlock, init_weights, run_blocks
from models.noise import Noise
from models.patches import patchify
from models.rope import rotate_, rotation_table
from models.sampling.canvas import TransformerSampler
from models.sampling.guidance import Guidance
from models.sampling.known import KnownPixels
from models.sampling.prepare import Linear, RMSNorm, Setup


@register_generator("ar", num_conds_out=1, reads=1)
class AR(Generator):
    """Causal transformer with rotary positions. Reads conditions[0]; hands down one condition.

    `proj_dropout` follows `wo` and `w2`; there is no dropout on attention weights.
    """

    def __init__(self, spec: LevelSpec):
        super().__init__(spec)
        dim = spec.embed_dim
        if dim % (4 * spec.num_heads):
            raise ValueError(
                f"level {spec.index}: an ar level's width must be a multiple of 4 * heads (2-D rotary embedding), "
                f"got width {dim} and {spec.num_heads} heads"
            )
        self.pos_embed_learned = nn.Parameter(torch.empty(1, spec.num_patches + 1, dim))
        self.patch_emb = nn.Linear(spec.patch_dim, dim)
        self.patch_emb_ln = nn.LayerNorm(dim, eps=1e-6)
        self.cond_emb = nn.Linear(spec.cond_dim, dim)
        self.blocks = nn.ModuleList(
            RotaryBlock(dim, spec.num_heads, spec.proj_dropout) for _ in range(spec.num_blocks)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        cos, sin = rotation_table(spec.grid, dim // spec.num_heads)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.apply(init_weights)
        nn.init.normal_(self.pos_embed_learned, std=0.02)

    def run(self, x: Tensor) -> Tensor:
        span = slice(0, x.shape[1])
        rotation = self.rope_cos[span], self.rope_sin[span]
        return run_blocks(self.blocks, x, rotation, checkpointing=self.spec.grad_checkpointing)

    def forward(self, images: Tensor, conds: Sequence[Tensor], choices: ForwardOptions) -> LevelOutput:
        patches = patchify(images, self.spec.patch_size)  # (N, L, C)
        # The last patch is context for nobody.
        tokens = torch.cat(
            [self.cond_emb(conds[0])[:, None], self.patch_emb(patches[:, :-1])], dim=1
        )  # (N, L, D)
        x = self.patch_emb_ln(tokens + self.pos_embed_learned[:, :-1])
        out = self.norm(self.run(x))
        size = self.spec.patch_size
        return LevelOutput(patches.reshape(-1, 3, size, size), [out.flatten(0, 1)])

    def sampler(self, child, setup: Setup) -> "ARSampler":
        return ARSampler(self, child, setup)


class PreparedRotaryBlock:
    """A RotaryBlock for the next tokens of sequences, whose earlier ones are in a cache."""

    def __init__(self, block: RotaryBlock, dtype: torch.dtype):
        attention, forward = block.attention, block.feed_forward
        self.num_heads = attention.num_heads
        self.norm1, self.norm2 = RMSNorm(block.attention_norm, dtype), RMSNorm(block.ffn_norm, dtype)
        self.wqkv = Linear(attention.wqkv.weight * self.norm1.scale, None, dtype)
        self.wo, self.w2 = Linear.of(attention.wo, dtype), Linear.of(forward.w2, dtype)
        self.w13 = Linear(torch.cat([forward.w1.weight, forward.w3.weight]) * self.norm2.scale, None, dtype)

    def __call__(
        self, x: Tensor, rotation: Tensor, cache: Tensor, places: slice | Tensor, mask: Tensor | None
    ) -> Tensor:
        """The next T tokens of each sequence, x (M * T, D), their rotation (T, 1, 1, d / 2) complex, and the cache
        (2, M, h, L, d), where their keys and values are put. `places` are their numbers, as a slice or (T,) int64, and
        `mask` (T, S) says which of the cache's first S tokens each sees; None: all."""
        qkv = self.wqkv(self.norm1(x)).view(
            cache.shape[1], len(rotation), 3, self.num_heads, -1
        )  # (M, T, 3, h, d)
        turned = rotate_(qkv.float(), rotation).permute(2, 0, 3, 1, 4)  # (3, M, h, T, d)
        if isinstance(places, slice):
            cache[:, :, :, places] = turned[1:]
            cache = cache[:, :, :, : places.stop]
        else:
            cache.index_copy_(3, places, turned[1:].to(cache.dtype))
        k, v = cache.unbind(0)
        attended = F.scaled_dot_product_attention(turned[0].to(k.dtype), k, v, mask)  # (M, h, T, d)
        x = self.wo(attended.transpose(1, 2).reshape(len(x), -1), residual=x)
        gate, value = self.w13(self.norm2(x)).chunk(2, dim=1)
        return self.w2(F.silu(gate) * value, residual=x)


@dataclass
class ARState:
    """condition (h * N, D), embedded; cache (blocks, 2, h * N, heads, L, d), keys and values of the tokens so far; begun:
    whether the condition is among them."""

    condition: Tensor
    cache: Tensor
    halves: int
    begun: bool = False


class ARSampler(TransformerSampler):
    """Feeds one token a step, and what was known all along together."""

    def __init__(self, ar: AR, child, setup: Setup):
        super().__init__(ar, child, setup)
        self.blocks = [PreparedRotaryBlock(block, setup.dtype) for block in ar.blocks]
        self.pos = ar.pos_embed_learned[0].detach()
        self.rotation = torch.complex(ar.rope_cos.float(), ar.rope_sin.float())[
            :, None, None
        ]  # (1 + L, 1, 1, d / 2)
        self.places = torch.arange(ar.spec.num_patches, device=self.pos.device)
        self.run = setup.compile(self._run, self.pos.device)

    def start(
        self, conds, guidance: Guidance, noise: Noise, order: Tensor, given: KnownPixels | None = None
    ) -> ARState:
        condition, spec = self.cond_emb(conds[0].to(self.setup.dtype)), self.generator.spec
        head_dim = spec.embed_dim // spec.num_heads
        shape = (spec.num_blocks, 2, len(condition), spec.num_heads, spec.num_patches, head_dim)
        cache = condition.new_zeros(shape) if self.setup.compiled else condition.new_empty(shape)
        return ARState(condition, cache, 2 if guidance.doubled else 1)

    def predict(self, state: ARState, known: Tensor | None, begin: int, end: int) -> list[Tensor]:
        tokens = [state.condition[:, None]] if known is None or not state.begun else []
        state.begun = True
        if known is not None:
            embedded = self.patch_emb(known.flatten(0, 1).to(self.setup.dtype)).unflatten(0, known.shape[:2])
            tokens.append(embedded.repeat(state.halves, 1, 1))
        x = tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)
        if x.shape[1] > 1:
            return [self._run(x, slice(end - x.shape[1], end), state.cache)]
        return [
            self.run(x, self.places[begin:end] if self.setup.compiled else slice(begin, end), state.cache)
        ]

    def _run(self, x: Tensor, places: slice | Tensor, cache: Tensor) -> Tensor:
        """Embedded tokens (M, T, D) number `places` -> outputs of the last (M, D).

        A place in a tensor keeps all shapes the same, so that what is compiled for one place fits all: the whole cache is
        attended to, through a mask.
        """
        tokens, mask = x.shape[1], None
        if not isinstance(places, slice):
            mask = (self.places <= places)[None]
        elif tokens > 1:
            mask = self.places[: places.stop] <= self.places[places, None]
        rotation = self.rotation[places]
        x = self.embedding_norm((x.to(self.stream) + self.pos[places]).flatten(0, 1))
        for block, block_cache in zip(self.blocks, cache.unbind(0), strict=True):
            x = block(x, rotation, block_cache, places, mask)
        return self.norm(x if tokens == 1 else x.unflatten(0, (-1, tokens))[:, -1])
