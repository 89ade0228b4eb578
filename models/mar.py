"""MAR: patches in a random order, several a step (paper, 3.2; docs/format.md, "MAR levels").

Letters: N images, C channels, L patches, P cells of a patch, D width, T prefix tokens (the guiding pixel and
the conditions), R masked patches.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from models.attention import SelfAttention
from models.generator import (
    ForwardOptions,
    Generator,
    LevelOutput,
    LevelSpec,
    Mask,
    Steps,
    register_generator,
)
from models.layers import LayerNormBlock, PatchEmbedding, init_weights, run_blocks
from models.noise import Noise
from models.patches import patchify, with_neighbours
from models.pixelloss import PixelLoss
from models.recompute import Dropout

MASK_RATIO_MEAN, MASK_RATIO_STD = 1.0, 0.25
GUIDING_HEAD = {"embed_dim": 128, "num_blocks": 3, "num_heads": 4, "r_weight": 5.0}


def masked_counts(uniforms: np.ndarray, num_patches: int, train: bool) -> np.ndarray:
    """Numbers of masked patches (N,) int64, from 1 to L, decided by uniforms (N,) in [0, 1).

    Training: ceil(L r), where r is normal with mean 1 and standard deviation 0.25, truncated to [0, 1].
    Evaluation: uniform on 1..L (docs/format.md, "MAR levels").
    """
    if train:
        low, high = ndtr((0 - MASK_RATIO_MEAN) / MASK_RATIO_STD), ndtr((1 - MASK_RATIO_MEAN) / MASK_RATIO_STD)
        uniforms = MASK_RATIO_MEAN + MASK_RATIO_STD * ndtri(low + uniforms.astype(np.float64) * (high - low))
        counts = np.ceil(num_patches * uniforms)
    else:
        counts = 1 + np.floor(num_patches * uniforms.astype(np.float64))
    return counts.clip(1, num_patches).astype(np.int64)


def cosine_plan(
    num_patches: int, num_iter: int, hidden: int | None = None
) -> Iterator[tuple[int, int, float]]:
    """Yields the steps (begin, end, progress) of MaskGIT's cosine schedule (F6).

    A step decides the places [begin, end) of the order. Progress counts at least one patch as masked, even
    after the last step, which decides all that are left (docs/format.md, "Sampling"). If only `hidden`
    patches are to be sampled, the known patches come first in the order, and the schedule has proportionally
    fewer steps.
    """
    hidden = num_patches if hidden is None else hidden
    masked, steps = hidden, min(hidden, math.ceil(num_iter * hidden / num_patches))
    for step in range(steps):
        remain = math.floor(hidden * math.cos(math.pi / 2 * (step + 1) / steps))
        remain = max(1, min(remain, masked - 1))
        end = num_patches if step == steps - 1 else num_patches - remain
        yield num_patches - masked, end, (num_patches - remain) / num_patches
        masked = remain


@register_generator("mar", num_conds_out=None)
class MAR(Generator):
    """Masked transformer (F2). It uses `num_conds` conditions, and gives each patch its own output and the
    outputs of its neighbours, two along each axis, as conditions (docs/format.md, "MAR levels").
    """

    exact_likelihood = False
    has_feature_cache = True

    def __init__(self, spec: LevelSpec):
        super().__init__(spec)
        dim = spec.embed_dim
        self.num_prefix = spec.num_conds + spec.guiding_pixel
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed_learned = nn.Parameter(torch.empty(1, self.num_prefix + spec.num_patches, dim))
        self.patch_emb = PatchEmbedding(spec)
        self.patch_emb_ln = nn.LayerNorm(dim, eps=1e-6)
        self.cond_emb = nn.Linear(spec.cond_dim, dim)
        if spec.guiding_pixel:
            self.pix_proj = nn.Linear(spec.alphabet.channels, dim)
        self.attn_drop = Dropout(spec.attn_dropout)
        self.blocks = nn.ModuleList(LayerNormBlock(dim, spec.proj_dropout) for _ in range(spec.num_blocks))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        if spec.guiding_pixel:
            self.guiding_pixel_loss = PixelLoss(
                cond_dim=spec.cond_dim, alphabet=spec.alphabet, **GUIDING_HEAD
            )
        self.apply(init_weights)
        for token in (self.mask_token, self.pos_embed_learned):
            nn.init.normal_(token, std=0.02)

    def run(self, x: Tensor) -> Tensor:
        attend = SelfAttention(self.spec.num_heads, x.shape[1], dropout=self.attn_drop)
        return run_blocks(self.blocks, x, attend, self.spec.grad_checkpointing)

    def outputs(self, patches: Tensor, masked: Tensor, prefix: Tensor) -> Tensor:
        """Runs the transformer, and returns its outputs at the patches (N, L, D).

        `patches` are (N, L, C * P), `masked` is (N, L) bool, and `prefix` holds the prefix tokens (N, T, D).
        """
        known = self.patch_emb(patches)
        tokens = torch.where(masked[..., None], self.mask_token.to(known.dtype), known)
        x = torch.cat([prefix, tokens], dim=1)
        x = self.patch_emb_ln(x + self.pos_embed_learned)
        return self.norm(self.run(x))[:, prefix.shape[1] :]

    def forward(self, images: Tensor, conds: Sequence[Tensor], options: ForwardOptions) -> LevelOutput:
        """As `Generator.forward` (F2). Predicts the R masked patches, or with Steps all N * L patches.

        With a guiding pixel it also computes the guiding loss (docs/format.md, "MAR levels").
        """
        spec, terms = self.spec, []
        mask = options.masks[spec.index] if options.masks is not None else None
        if mask is None:
            mask = self.random_mask(len(images), options.train, images.device)
        prefix = [self.cond_emb(cond) for cond in reversed(conds[: spec.num_conds])]
        if spec.guiding_pixel:
            # The mean is taken over columns, then over rows. In this order ties (means of x.5) are rounded in
            # float32 as in the training of the published weights.
            pixel = images
            for _ in spec.grid:
                pixel = pixel.mean(-1)  # in the end (N, C)
            head = self.guiding_pixel_loss
            terms.append(head.loss_term(spec.index, pixel, conds, options.train, options.dither))
            if options.round_guiding_pixel:
                pixel = spec.alphabet.normalize(spec.alphabet.to_values(pixel), dtype=pixel.dtype)
            prefix.insert(0, self.pix_proj(pixel.to(self.dtype)))
        prefix = torch.stack(prefix, dim=1)  # (N, T, D)
        patches = patchify(images, spec.patch_size)  # (N, L, C * P)
        if isinstance(mask, Steps):
            conds, patches = self.in_steps(patches, mask, prefix), patches.flatten(0, 1)
        else:
            out = self.outputs(patches, mask.masked, prefix)
            conds = [cond.flatten(0, 1)[mask.rows] for cond in with_neighbours(out, spec.grid)]
            patches = patches.flatten(0, 1)[mask.rows]  # (R, C * P)
        return LevelOutput(patches.unflatten(1, spec.patch_shape), conds, terms)

    def in_steps(self, patches: Tensor, steps: Steps, prefix: Tensor) -> list[Tensor]:
        """Computes for each patch the conditions that it gets in its step of the sampler, each (N * L, D).

        It runs the transformer once for each step, on patches (N, L, C * P) and prefix tokens (N, T, D).
        """
        place = steps.order.argsort(dim=-1)[..., None]  # (N, L, 1)
        conds = None
        for begin, _ in steps.plan:  # later steps replace the conditions of the patches that they decide
            out = self.outputs(patches, place[..., 0] >= begin, prefix)
            new = with_neighbours(out, self.spec.grid)
            conds = (
                new
                if conds is None
                else [torch.where(place < begin, *pair) for pair in zip(conds, new, strict=True)]
            )
        return [cond.flatten(0, 1) for cond in conds]

    def random_mask(self, n: int, train: bool, device: torch.device) -> Mask:
        """Draws the mask of `n` images (docs/format.md, "MAR levels").

        The counts come from NumPy's global generator, so that the host knows them, the orders from torch's
        generator on the device.
        """
        length = self.spec.num_patches
        counts = masked_counts(np.random.random(n), length, train)
        return Mask.of_counts(counts, torch.rand(n, length, device=device))

    def draw_mask(self, noise: Noise, train: bool) -> Mask:
        counts = masked_counts(noise.mask_uniforms.numpy(), self.spec.num_patches, train)
        return Mask.of_counts(counts, noise.order_uniforms)

    def draw_steps(self, noise: Noise, num_iter: int) -> Steps:
        plan = tuple((begin, end) for begin, end, _ in self.plan(num_iter))
        return Steps(self.order(noise.order_uniforms), plan)

    def plan(self, num_iter: int, hidden: int | None = None) -> Iterator[tuple[int, int, float]]:
        return cosine_plan(self.spec.num_patches, num_iter, hidden)

    def order(self, uniforms: Tensor, precedence: Tensor | None = None) -> Tensor:
        return (uniforms if precedence is None else uniforms + precedence).argsort(dim=-1, stable=True)
