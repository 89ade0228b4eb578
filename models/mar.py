"""MAR: patches in a random order, several at a time, attention in both directions (paper section 3.2; SPEC section 3).

Letters: N images, L patches, C = 3 * p * p, K conditions, D width, P prefix tokens (guiding pixel, conditions),
R masked patches, k patches decided in one step, h halves (2 with guidance, else 1), T = P + L tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from models.generator import (
    ForwardOptions,
    Generator,
    LevelOutput,
    LevelSpec,
    Mask,
    Steps,
    register_generator,
)
from models.layers import Block, dot_product_attention, init_weights, run_blocks
from models.noise import Noise
from models.patches import patchify, with_neighbours
from models.pixelloss import PixelLoss
from models.sampling.canvas import TransformerSampler
from models.sampling.guidance import Guidance
from models.sampling.known import KnownPixels
from models.sampling.prepare import Linear, PreparedBlock, Setup, merge_heads, split_heads
from util.pixels import normalize, to_values

MASK_RATIO_MEAN, MASK_RATIO_STD = 1.0, 0.25
CACHED_TOKENS = 1024  # sampled together on a CPU
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


def cosine_plan(
    num_patches: int, num_iter: int, hidden: int | None = None
) -> Iterator[tuple[int, int, float]]:
    """Steps (begin, end, progress) of the cosine schedule: places [begin, end) of the order (MaskGIT; SPEC section 5).

    Progress counts at least one patch as masked, also after the last step, which decides all that is left.
    With only `hidden` patches to draw the others come first, and the schedule's steps shrink in proportion.
    """
    hidden = num_patches if hidden is None else hidden
    masked, steps = hidden, min(hidden, math.ceil(num_iter * hidden / num_patches))
    for step in range(steps):
        remain = math.floor(hidden * math.cos(math.pi / 2 * (step + 1) / steps))
        remain = max(1, min(remain, masked - 1))
        end = num_patches if step == steps - 1 else num_patches - remain
        yield num_patches - masked, end, (num_patches - remain) / num_patches
        masked = remain


@register_generator("mar", num_conds_out=5)
class MAR(Generator):
    """Masked transformer. Reads `num_conds` conditions; hands down the patch's own output and its four neighbours'."""

    def __init__(self, spec: LevelSpec):
        super().__init__(spec)
        dim = spec.embed_dim
        self.num_prefix = spec.num_conds + spec.guiding_pixel
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed_learned = nn.Parameter(torch.empty(1, self.num_prefix + spec.num_patches, dim))
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
        x = torch.cat([prefix, tokens], dim=1)
        x = self.patch_emb_ln(x + self.pos_embed_learned)
        return self.norm(self.run(x))[:, prefix.shape[1] :]

    def draw_mask(self, noise: Noise, train: bool) -> Mask:
        return Mask.of_counts(masked_counts(noise.count.numpy(), self.spec.num_patches, train), noise.order)

    def draw_steps(self, noise: Noise, num_iter: int) -> Steps:
        return Steps(self.order(noise), tuple((begin, end) for begin, end, _ in self.plan(num_iter)))

    def random_mask(self, n: int, train: bool, device: torch.device) -> Mask:
        """Counts from NumPy's global generator, so that the host knows them; orders from torch's on the device."""
        length = self.spec.num_patches
        counts = masked_counts(np.random.random(n), length, train)
        return Mask.of_counts(counts, torch.rand(n, length, device=device))

    def forward(self, images: Tensor, conds: Sequence[Tensor], choices: ForwardOptions) -> LevelOutput:
        spec = self.spec
        mask = choices.masks[spec.index] if choices.masks is not None else None
        if mask is None:
            mask = self.random_mask(len(images), choices.train, images.device)
        pixel = nll = None
        if spec.guiding_pixel:
            # Columns, then rows: in this order float32 breaks ties (means of x.5 levels) as the published weights learnt.
            pixel = images.mean(-1).mean(-1)  # (N, 3)
            nll = self.guiding_pixel_loss(pixel, conds, choices.dither)
            if choices.as_drawn:
                pixel = normalize(to_values(pixel), dtype=pixel.dtype)
        patches = patchify(images, spec.patch_size)  # (N, L, C)
        prefix = self.embed_prefix(conds, pixel)
        if isinstance(mask, Steps):
            handed, patches = self.in_steps(patches, mask, prefix), patches.flatten(0, 1)
        else:
            out = self.trunk(patches, mask.masked, prefix)
            handed = [cond.flatten(0, 1)[mask.rows] for cond in with_neighbours(out)]
            patches = patches.flatten(0, 1)[mask.rows]  # (R, C)
        return LevelOutput(patches.unflatten(1, (3, spec.patch_size, spec.patch_size)), handed, nll)

    def in_steps(self, patches: Tensor, steps: Steps, prefix: Tensor) -> list[Tensor]:
        """Patches (N, L, C), prefix (N, P, D) -> conditions, each (N * L, D): every patch's from the step that decides it."""
        place = steps.order.argsort(dim=-1)[..., None]  # (N, L, 1)
        handed = None
        for begin, _ in steps.plan:  # later steps replace what they decide
            new = with_neighbours(self.trunk(patches, place[..., 0] >= begin, prefix))
            handed = [torch.where(place < begin, *pair) for pair in zip(handed or new, new, strict=True)]
        return [cond.flatten(0, 1) for cond in handed]

    def sampler(self, child, setup: Setup) -> "MARSampler":
        if setup.refresh > 1 and self.spec.index == 0:
            from models.sampling.feature_cache import LazyMARSampler  # which builds on this file

            return LazyMARSampler(self, child, setup)
        return MARSampler(self, child, setup)

    def plan(self, num_iter: int, hidden: int | None = None) -> Iterator[tuple[int, int, float]]:
        return cosine_plan(self.spec.num_patches, num_iter, hidden)

    def order(self, noise: Noise, given: KnownPixels | None = None) -> Tensor:
        numbers = noise.order
        if given is not None:
            numbers = numbers + given.precedence(self.spec.patch_size).to(numbers.device)
        return numbers.argsort(dim=-1, stable=True)


@dataclass
class MARState:
    """x (h * N, P + L, D): embedded tokens, the patches known ones or mask tokens. In the order in which they are decided:
    order (N, L); rows (h * N, L, r), the numbers in x.flatten(0, 1) of the outputs that a patch's conditions need (itself
    first); inside (h * N, L, r, 1), 0 where such a neighbour lies outside the image. pixel (N, 3): the guiding ones."""

    x: Tensor
    order: Tensor
    rows: Tensor
    inside: Tensor
    halves: int
    pixel: Tensor | None = None


class MARSampler(TransformerSampler):
    """Embeds each token once, and in the last block computes only what goes down."""

    def __init__(self, mar: MAR, child, setup: Setup):
        super().__init__(mar, child, setup)
        dtype, length = setup.dtype, mar.spec.num_patches
        *self.blocks, self.last = [PreparedBlock(block, dtype) for block in mar.blocks]
        (weight, bias), dim = mar.blocks[-1].attn.qkv.parameters(), mar.spec.embed_dim
        self.last_q, self.last_kv = (
            Linear(weight[:dim], bias[:dim], dtype),
            Linear(weight[dim:], bias[dim:], dtype),
        )
        self.pos_prefix, self.pos = mar.pos_embed_learned[0].detach().split([mar.num_prefix, length])
        self.masked = self.embedding_norm(mar.mask_token[0] + self.pos)  # (L, D)
        numbers = torch.arange(1, length + 1, device=self.pos.device)[None, :, None]
        around = torch.cat(with_neighbours(numbers) if child.reads > 1 else [numbers], dim=-1)[
            0
        ]  # (L, r), 0 = outside
        self.inside = (around > 0).to(dtype)[..., None]
        self.offsets = torch.where(around > 0, around - numbers[0], 0)
        if mar.spec.guiding_pixel:
            self.pix_proj = Linear.of(mar.pix_proj, dtype)
            self.guiding_pixel = mar.guiding_pixel_loss.sampler(setup)
        self.run = setup.compile(self._run, self.pos.device)

    def start(
        self, conds, guidance: Guidance, noise: Noise, order: Tensor, given: KnownPixels | None = None
    ) -> MARState:
        dtype, spec = self.setup.dtype, self.generator.spec
        tokens = [self.cond_emb(cond.to(dtype)) for cond in reversed(conds[: spec.num_conds])]
        if spec.guiding_pixel:
            head = guidance.head(spec.index - 1)
            pixel = self.guiding_pixel.pixels(conds, head, noise, given and given.guide_weights)  # (N, 3)
            tokens.insert(0, self.pix_proj(guidance.double(pixel.to(dtype))))
        else:
            pixel = None
        prefix = self.embedding_norm(
            torch.stack(tokens, dim=1).to(self.stream) + self.pos_prefix
        )  # (h * N, P, D)
        x = torch.cat([prefix, self.masked.expand(len(prefix), -1, -1)], dim=1)
        n, length, _ = x.shape
        first = torch.arange(prefix.shape[1], n * length, length, device=x.device)[:, None]
        both = guidance.double(order)
        return MARState(
            x,
            order,
            (first + both)[..., None] + self.offsets[both],
            self.inside[both],
            n // len(order),
            pixel,
        )

    def first_canvas(self, state: MARState, order: Tensor, given: KnownPixels | None) -> Tensor:
        if state.pixel is None or given is not None:
            return super().first_canvas(state, order, given)
        return state.pixel.repeat_interleave(self.generator.spec.patch_size**2, dim=1)[:, None].repeat(
            1, order.shape[1], 1
        )

    def reveal(self, state: MARState, known: Tensor, begin: int, end: int) -> Tensor:
        """Embeds the patches `known` (N, k, C), decided at places [begin, end) -> their rows (h * N, k)."""
        x = self.patch_emb(known.flatten(0, 1).to(self.setup.dtype)).to(self.stream)
        x = self.embedding_norm(x + self.pos[state.order[:, begin:end].flatten()])
        rows = state.rows[:, begin:end, 0]
        state.x.flatten(0, 1).index_copy_(0, rows.flatten(), x.repeat(state.halves, 1))
        return rows

    def predict(self, state: MARState, known: Tensor | None, begin: int, end: int) -> list[Tensor]:
        new = (
            state.rows[:, :0, 0]
            if known is None
            else self.reveal(state, known, begin - known.shape[1], begin)
        )
        rows = state.rows[:, begin:end]  # (h * N, k, r)
        out = self.outputs(state, new, rows.flatten(1))
        if rows.shape[-1] == 1:
            return [out]
        return list(
            (out.unflatten(0, (-1, rows.shape[-1])) * state.inside[:, begin:end].flatten(0, 1)).unbind(1)
        )

    def outputs(self, state: MARState, new: Tensor, rows: Tensor) -> Tensor:
        """Numbers `rows` (n, R) in x.flatten(0, 1) -> the trunk's outputs there (n * R, D); those in `new` (n, k) have changed.

        On a CPU, as many sequences at a time as keep their activations in its cache.
        """
        x = state.x
        n, length, _ = x.shape
        size = max(1, CACHED_TOKENS // length) if x.device.type == "cpu" else n
        if n <= size:
            return self.run(x, rows)
        return torch.cat(
            [self.run(x[i : i + size], rows[i : i + size] - i * length) for i in range(0, n, size)]
        )

    def _run(self, x: Tensor, rows: Tensor) -> Tensor:
        n, length, _ = x.shape
        heads = self.generator.spec.num_heads
        x = x.flatten(0, 1)
        for block in self.blocks:
            q, k, v = split_heads(block.qkv(block.norm1(x)), n, heads, 3)
            x = block.after_attention(x, merge_heads(dot_product_attention(q, k, v)))
        some, y = rows.shape[1] < length, self.last.norm1(x)
        k, v = split_heads(self.last_kv(y), n, heads, 2)
        if some:
            x, y = x[rows.flatten()], y[rows.flatten()]
        (q,) = split_heads(self.last_q(y), n, heads, 1)
        x = self.norm(self.last.after_attention(x, merge_heads(dot_product_attention(q, k, v))))
        return x if some else x[rows.flatten()]
