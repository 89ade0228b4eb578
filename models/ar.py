"""AR: patches in raster order, each given those before it (paper, 3.2; docs/format.md, "AR levels").

Letters: N images, C channels, L patches, P cells of a patch, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.attention import SelfAttention, rotation_table
from models.generator import ForwardOptions, Generator, LevelOutput, LevelSpec, register_generator
from models.layers import PatchEmbedding, RMSNormBlock, init_weights, run_blocks
from models.patches import patchify


@register_generator("ar", num_conds_out=1, num_conds_in=1)
class AR(Generator):
    """Causal transformer with rotary positions (F2). It uses `conds[0]` and gives each patch one condition.

    `proj_dropout` acts after `wo` and `w2`; there is no dropout on attention weights
    (docs/format.md, "AR levels").
    """

    def __init__(self, spec: LevelSpec):
        super().__init__(spec)
        dim, axes = spec.embed_dim, len(spec.grid)
        if dim % (2 * spec.num_heads) or dim < 2 * axes * spec.num_heads:
            raise ValueError(
                f"level {spec.index}: an ar level's width must be a multiple of 2 * heads, at least "
                f"{2 * axes} * heads ({axes}-D rotary embedding), got width {dim} and {spec.num_heads} heads"
            )
        self.pos_embed_learned = nn.Parameter(torch.empty(1, spec.num_patches + 1, dim))
        self.patch_emb = PatchEmbedding(spec)
        self.patch_emb_ln = nn.LayerNorm(dim, eps=1e-6)
        self.cond_emb = nn.Linear(spec.cond_dim, dim)
        self.blocks = nn.ModuleList(RMSNormBlock(dim, spec.proj_dropout) for _ in range(spec.num_blocks))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        cos, sin = rotation_table(spec.grid, dim // spec.num_heads)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.apply(init_weights)
        nn.init.normal_(self.pos_embed_learned, std=0.02)

    def run(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        rotation = self.rope_cos[:length], self.rope_sin[:length]
        attend = SelfAttention(self.spec.num_heads, length, causal=True, rotation=rotation)
        return run_blocks(self.blocks, x, attend, self.spec.grad_checkpointing)

    def forward(self, images: Tensor, conds: Sequence[Tensor], options: ForwardOptions) -> LevelOutput:
        """As `Generator.forward` (F2): one causal pass gives the conditions of all patches, so R = N * L."""
        patches = patchify(images, self.spec.patch_size)  # (N, L, C * P)
        # The last patch is context for no other patch.
        tokens = torch.cat(
            [self.cond_emb(conds[0])[:, None], self.patch_emb(patches[:, :-1])], dim=1
        )  # (N, L, D)
        x = self.patch_emb_ln(tokens + self.pos_embed_learned[:, :-1])
        out = self.norm(self.run(x))
        return LevelOutput(patches.reshape(-1, *self.spec.patch_shape), [out.flatten(0, 1)])
