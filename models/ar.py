"""AR: patches in raster order, each given all before it (paper section 3.2; SPEC section 3).

Letters: N pictures, L patches, C = 3 * p * p, D width, h halves (2 with guidance, else 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.generator import Choices, Generator, Handed, LevelSpec, register_generator
from models.guidance import Guidance
from models.layers import KVCache, RotaryBlock, init_weights, make_caches, run_blocks
from models.noise import Noise
from models.patches import patchify
from models.rope import rotation_table


@dataclass
class ARState:
    condition: Tensor  # (h * N, D)
    caches: list[KVCache]
    halves: int


@register_generator("ar", hands_down=1, reads=1)
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
        self.blocks = nn.ModuleList(RotaryBlock(dim, spec.num_heads, spec.proj_dropout) for _ in range(spec.num_blocks))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        cos, sin = rotation_table(spec.grid, dim // spec.num_heads)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.apply(init_weights)
        nn.init.normal_(self.pos_embed_learned, std=0.02)

    def run(self, x: Tensor, start: int = 0, caches: Sequence[KVCache] | None = None) -> Tensor:
        span = slice(start, start + x.shape[1])
        rotation = self.rope_cos[span], self.rope_sin[span]
        return run_blocks(self.blocks, x, rotation, caches=caches, checkpointing=self.spec.grad_checkpointing)

    def trunk(self, tokens: Tensor, start: int = 0, caches: Sequence[KVCache] | None = None) -> Tensor:
        """Embedded tokens number start, start + 1, … (N, T, D) -> outputs (N, T, D)."""
        x = self.patch_emb_ln(tokens + self.pos_embed_learned[:, start : start + tokens.shape[1]])
        return self.norm(self.run(x, start, caches))

    def forward(self, pictures: Tensor, conds: Sequence[Tensor], choices: Choices) -> Handed:
        patches = patchify(pictures, self.spec.patch_size)  # (N, L, C)
        # The last patch is context for nobody.
        tokens = torch.cat([self.cond_emb(conds[0])[:, None], self.patch_emb(patches[:, :-1])], dim=1)  # (N, L, D)
        out = self.trunk(tokens)
        size = self.spec.patch_size
        return Handed(patches.reshape(-1, 3, size, size), [out.flatten(0, 1)])

    def start(self, conds: Sequence[Tensor], guidance: Guidance, noise: Noise, order: Tensor) -> ARState:
        condition = self.cond_emb(conds[0])
        caches = make_caches(self.blocks, self.spec.num_heads, self.spec.num_patches, condition)
        return ARState(condition, caches, 2 if guidance.doubled else 1)

    def predict(self, state: ARState, canvas: Tensor, order: Tensor, begin: int, end: int) -> list[Tensor]:
        if begin == 0:
            token = state.condition
        else:
            token = self.patch_emb(canvas[:, begin - 1]).repeat(state.halves, 1)
        return [self.trunk(token[:, None], begin, state.caches).squeeze(1)]
