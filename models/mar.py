"""MAR: patches in a random order, several at a time, attention in both directions (paper section 3.2; SPEC section 3).

Letters: N pictures, L patches, C = 3 * p * p, K conditions, D width, P prefix tokens (guiding pixel, conditions),
R masked patches, k patches decided in one step, h halves (2 with guidance, else 1).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from models.generator import Choices, Generator, Handed, LevelSpec, Mask, register_generator
from models.guidance import Guidance
from models.layers import Block, init_weights, run_blocks
from models.noise import Noise
from models.patches import patchify, take, with_neighbours
from models.pixelloss import PixelLoss

MASK_RATIO_MEAN, MASK_RATIO_STD = 1.0, 0.25
GUIDING_HEAD = {"embed_dim": 128, "num_blocks": 3, "num_heads": 4}


def masked_counts(uniforms: np.ndarray, num_patches: int, train: bool) -> np.ndarray:
    """Uniforms (N,) -> numbers of masked patches (N,) int64, from 1 to L.

    Training: ceil(L r), r normal (1, 0.25) truncated to [0, 1]. Evaluation: uniform on 1..L.
    """
    if train:
        low, high = ndtr((0 - MASK_RATIO_MEAN) / MASK_RATIO_STD), ndtr((1 - MASK_RATIO_MEAN) / MASK_RATIO_STD)
        uniforms = MASK_RATIO_MEAN + MASK_RATIO_STD * ndtri(low + uniforms.astype(np.float64) * (high - low))
        counts = np.ceil(num_patches * uniforms)
    else:
        counts = 1 + np.floor(num_patches * uniforms.astype(np.float64))
    return counts.clip(1, num_patches).astype(np.int64)


def cosine_plan(num_patches: int, num_iter: int) -> Iterator[tuple[int, int, float]]:
    """Steps (begin, end, progress) of the cosine schedule: places [begin, end) of the order (MaskGIT; SPEC section 5).

    Progress counts at least one patch as masked, also after the last step, which decides all that is left.
    """
    masked, steps = num_patches, min(num_patches, num_iter)
    for step in range(steps):
        remain = math.floor(num_patches * math.cos(math.pi / 2 * (step + 1) / steps))
        remain = max(1, min(remain, masked - 1))
        end = num_patches if step == steps - 1 else num_patches - remain
        yield num_patches - masked, end, (num_patches - remain) / num_patches
        masked = remain


@dataclass
class MARState:
    prefix: Tensor  # (h * N, P, D)
    rank: Tensor  # (N, L), each patch's place in the order
    halves: int


@register_generator("mar", hands_down=5)
class MAR(Generator):
    """Masked transformer. Reads `num_conds` conditions; hands down the patch's own output and its four neighbours'."""

    def __init__(self, spec: LevelSpec):
        super().__init__(spec)
        dim = spec.embed_dim
        prefix = spec.num_conds + spec.guiding_pixel
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed_learned = nn.Parameter(torch.empty(1, prefix + spec.num_patches, dim))
        self.patch_emb = nn.Linear(spec.patch_dim, dim)
        self.patch_emb_ln = nn.LayerNorm(dim, eps=1e-6)
        self.cond_emb = nn.Linear(spec.cond_dim, dim)
        if spec.guiding_pixel:
            self.pix_proj = nn.Linear(3, dim)
        self.blocks = nn.ModuleList(
            Block(dim, spec.num_heads, spec.attn_dropout, spec.proj_dropout) for _ in range(spec.num_blocks)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        if spec.guiding_pixel:
            self.guiding_pixel_loss = PixelLoss(cond_dim=spec.cond_dim, **GUIDING_HEAD)
        self.apply(init_weights)
        for token in (self.mask_token, self.pos_embed_learned):
            nn.init.normal_(token, std=0.02)

    def embed_prefix(self, conds: Sequence[Tensor], guiding_pixel: Tensor | None) -> Tensor:
        """Conditions, each (N, cond_dim), and guiding pixels (N, 3) -> prefix tokens (N, P, D)."""
        tokens = [self.cond_emb(cond) for cond in reversed(conds[: self.spec.num_conds])]
        if guiding_pixel is not None:
            tokens.insert(0, self.pix_proj(guiding_pixel))
        return torch.stack(tokens, dim=1)

    def run(self, x: Tensor) -> Tensor:
        return run_blocks(self.blocks, x, checkpointing=self.spec.grad_checkpointing)

    def trunk(self, patches: Tensor, masked: Tensor, prefix: Tensor) -> Tensor:
        """Patches (N, L, C), masked (N, L) bool, prefix (N, P, D) -> outputs at the patches (N, L, D)."""
        known = self.patch_emb(patches)
        tokens = torch.where(masked[..., None], self.mask_token.to(known.dtype), known)
        tokens = tokens.repeat(len(prefix) // len(tokens), 1, 1)  # both halves share the canvas
        x = torch.cat([prefix, tokens], dim=1)
        x = self.patch_emb_ln(x + self.pos_embed_learned)
        return self.norm(self.run(x))[:, prefix.shape[1] :]

    def draw_mask(self, noise: Noise, train: bool) -> Mask:
        return Mask.of_counts(masked_counts(noise.count.numpy(), self.spec.num_patches, train), noise.order)

    def random_mask(self, n: int, train: bool, device: torch.device) -> Mask:
        """Counts from NumPy's global generator, so that the host knows them; orders from torch's on the device."""
        length = self.spec.num_patches
        counts = masked_counts(np.random.random(n), length, train)
        return Mask.of_counts(counts, torch.rand(n, length, device=device))

    def forward(self, pictures: Tensor, conds: Sequence[Tensor], choices: Choices) -> Handed:
        spec = self.spec
        mask = choices.masks[spec.index] if choices.masks is not None else None
        if mask is None:
            mask = self.random_mask(len(pictures), choices.train, pictures.device)
        pixel = nll = None
        if spec.guiding_pixel:
            # Columns, then rows: in this order float32 breaks ties (means of x.5 levels) as the published weights learnt.
            pixel = pictures.mean(-1).mean(-1)  # (N, 3)
            nll = self.guiding_pixel_loss(pixel, conds, choices.dither)
        patches = patchify(pictures, spec.patch_size)  # (N, L, C)
        out = self.trunk(patches, mask.masked, self.embed_prefix(conds, pixel))
        handed = [cond.flatten(0, 1)[mask.rows] for cond in with_neighbours(out)]
        patches = patches.flatten(0, 1)[mask.rows]  # (R, C)
        return Handed(patches.unflatten(1, (3, spec.patch_size, spec.patch_size)), handed, nll)

    def start(self, conds: Sequence[Tensor], guidance: Guidance, noise: Noise, order: Tensor) -> MARState:
        pixel = None
        if self.spec.guiding_pixel:
            pixel = self.guiding_pixel_loss.draw(conds, guidance, noise)[:, :, 0, 0]  # (N, 3)
            pixel = guidance.double(pixel).to(self.pix_proj.weight.dtype)
        return MARState(self.embed_prefix(conds, pixel), order.argsort(-1), 2 if guidance.doubled else 1)

    def plan(self, num_iter: int) -> Iterator[tuple[int, int, float]]:
        return cosine_plan(self.spec.num_patches, num_iter)

    def order(self, noise: Noise) -> Tensor:
        return noise.order.argsort(dim=-1, stable=True)

    def predict(self, state: MARState, canvas: Tensor, order: Tensor, begin: int, end: int) -> list[Tensor]:
        out = self.trunk(canvas, state.rank >= begin, state.prefix)  # (h * N, L, D)
        where = order[:, begin:end].repeat(state.halves, 1)  # (h * N, k)
        return [take(cond, where).flatten(0, 1) for cond in with_neighbours(out)]
