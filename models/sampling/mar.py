"""How a MAR level decides its next patches (docs/format.md, "MAR levels"), exactly or with a feature cache.

Letters: N images, C channels, L patches, P cells of a patch, D width, t prefix tokens, k patches of one step,
h halves (2 with guidance, otherwise 1), n = h * N sequences, T = t + L tokens, R rows (some tokens of all
sequences), r outputs that the conditions of a patch consist of: 1 + 2 * axes with neighbours, otherwise 1.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.attention import SelfAttention, dot_product_attention, merge_heads, split_heads
from models.mar import MAR
from models.patches import with_neighbours
from models.sampling.canvas import Batch, Sampler, TransformerSampler, register_sampler
from models.sampling.pixel import PixelSampler
from models.sampling.prepare import FastLinear, Setup, prepare_block

MAX_CACHED_TOKENS = 1024  # whose activations stay in a CPU's cache: 1.2 to 1.3 times as fast (docs/log.md)


@dataclass
class CachedAttention:
    """Attention of some tokens to all tokens, whose other keys and values are old (not in the paper).

    rows             (R,): the tokens that are computed anew; None: all tokens
    keys_and_values  (n * T, 2 D), where the other tokens keep their last ones; None before the first call
    """

    num_heads: int
    num_sequences: int
    rows: Tensor | None = None
    keys_and_values: Tensor | None = None

    def __call__(self, *projected: Tensor) -> Tensor:
        if len(projected) == 1:
            projected = projected[0].tensor_split([projected[0].shape[1] // 3], dim=1)
        queries, new = projected
        if self.rows is None:
            self.keys_and_values = new.contiguous()
        else:
            self.keys_and_values.index_copy_(0, self.rows, new)
        q, k, v = split_heads((queries, self.keys_and_values), self.num_sequences, self.num_heads)
        return merge_heads(dot_product_attention(q, k, v))


@dataclass
class MARState:
    """The state of N images of a MAR level (docs/format.md, "MAR levels").

    x        (n, T, D): embedded tokens, with a mask token for each patch that is not decided
    order    (N, L): the numbers of the patches in the order in which they are decided
    rows     (n, L, r): for each patch, in that order, the numbers in x.flatten(0, 1) of the outputs that its
             conditions consist of, its own first
    valid    (n, L, r, 1): 0 where such a neighbour lies outside the image, otherwise 1
    pixel    (N, C): the guiding pixels, normalised, or None
    step     the number of steps that are done
    attends  the feature cache, one CachedAttention for each block
    """

    x: Tensor
    order: Tensor
    rows: Tensor
    valid: Tensor
    pixel: Tensor | None
    step: int = 0
    attends: list[CachedAttention] = field(default_factory=list)


@register_sampler(MAR)
class MARSampler(TransformerSampler):
    """Samples a MAR level (docs/format.md, "MAR levels" and "Sampling").

    It embeds each token once, and in the last block computes only the outputs that are passed down. With
    `feature_cache_interval` i above 1, level 0 is approximate (in the spirit of LazyMAR, arXiv 2503.12450).
    Most tokens' features hardly change between two steps, so only every i-th step computes all of them. The
    other steps compute the features of the patches just decided and of the patches whose outputs are needed.
    """

    def __init__(self, mar: MAR, child: Sampler, setup: Setup):
        super().__init__(mar, child, setup)
        length = mar.spec.num_patches
        self.blocks = [prepare_block(block, setup.dtype) for block in mar.blocks]
        self.pos_prefix, self.pos = mar.pos_embed_learned[0].detach().split([mar.num_prefix, length])
        self.masked = self.embedding_norm(mar.mask_token[0] + self.pos)  # (L, D)
        numbers = torch.arange(1, length + 1, device=self.pos.device)[None, :, None]
        around = torch.cat(
            with_neighbours(numbers, mar.spec.grid) if child.num_conds > 1 else [numbers], dim=-1
        )[0]
        self.valid = (around > 0).to(setup.dtype)[..., None]  # (L, r, 1)
        self.offsets = torch.where(around > 0, around - numbers[0], 0)
        if mar.spec.guiding_pixel:
            self.pix_proj = FastLinear.of(mar.pix_proj, setup.dtype)
            self.guiding_pixel = PixelSampler(mar.guiding_pixel_loss, setup)
        self.interval = setup.options.feature_cache_interval if mar.spec.index == 0 else 1
        self.run = setup.compile(MARSampler._run, self.pos.device)

    def start(self, batch: Batch, order: Tensor) -> MARState:
        """Samples the guiding pixels, if the level has them, and embeds conditions and mask tokens."""
        dtype, spec, guidance, pixel = self.setup.dtype, self.generator.spec, batch.guidance, None
        tokens = [self.cond_emb(cond.to(dtype)) for cond in reversed(batch.conds[: spec.num_conds])]
        if spec.guiding_pixel:
            weigh = batch.known.guiding_weights if batch.known is not None else None
            head = guidance.head(spec.index - 1)
            pixel = self.guiding_pixel.pixels(batch.conds, head, batch.noise, weigh)  # (N, C)
            tokens.insert(0, self.pix_proj(guidance.double(pixel.to(dtype))))
        prefix = self.embedding_norm(
            torch.stack(tokens, dim=1).to(self.stream) + self.pos_prefix
        )  # (n, t, D)
        x = torch.cat([prefix, self.masked.expand(len(prefix), -1, -1)], dim=1)
        n, length, _ = x.shape
        first = torch.arange(prefix.shape[1], n * length, length, device=x.device)[:, None]
        both = guidance.double(order)
        return MARState(x, order, (first + both)[..., None] + self.offsets[both], self.valid[both], pixel)

    def first_canvas(self, state: MARState, batch: Batch) -> Tensor:
        canvas = super().first_canvas(state, batch)
        if state.pixel is None or batch.known is not None:
            return canvas
        return state.pixel.view(*state.pixel.shape, *[1] * len(self.patch_size)).expand_as(canvas)

    def predict(self, state: MARState, new: Tensor | None, begin: int, end: int) -> list[Tensor]:
        """As `LevelSampler.predict`: the conditions are the patch's own output and its neighbours'."""
        changed = (
            state.rows[:, :0, 0] if new is None else self.reveal(state, new, begin - new.shape[1], begin)
        )
        rows = state.rows[:, begin:end]  # (n, k, r)
        if self.interval > 1:
            out = self.cached_outputs(state, changed, rows.flatten(1))
        else:
            out = self.outputs(state, rows.flatten(1))
        if rows.shape[-1] == 1:
            return [out]
        return list(
            (out.unflatten(0, (-1, rows.shape[-1])) * state.valid[:, begin:end].flatten(0, 1)).unbind(1)
        )

    def reveal(self, state: MARState, new: Tensor, begin: int, end: int) -> Tensor:
        """Embeds the patches `new` (N, k, C * P) at places [begin, end), and returns their rows (n, k)."""
        x = self.embed(new).to(self.stream)
        x = self.embedding_norm(x + self.pos[state.order[:, begin:end].flatten()])
        rows = state.rows[:, begin:end, 0]
        state.x.flatten(0, 1).index_copy_(0, rows.flatten(), x.repeat(len(state.x) // len(state.order), 1))
        return rows

    def outputs(self, state: MARState, rows: Tensor) -> Tensor:
        """Computes the transformer's outputs (n * R, D) at `rows` (n, R), numbers in x.flatten(0, 1).

        On a CPU it runs only as many sequences at a time as keep their activations in the CPU's cache.
        """
        x = state.x
        n, length, _ = x.shape
        size = max(1, MAX_CACHED_TOKENS // length) if x.device.type == "cpu" else n
        if n <= size:
            return self.run(self, x, rows)
        parts = range(0, n, size)
        return torch.cat([self.run(self, x[i : i + size], rows[i : i + size] - i * length) for i in parts])

    def _run(self, x: Tensor, rows: Tensor) -> Tensor:
        attend = SelfAttention(self.generator.spec.num_heads, x.shape[1])
        some, flat_rows, x = rows.shape[1] < x.shape[1], rows.flatten(), x.flatten(0, 1)
        for block in self.blocks[:-1]:
            x = block.forward(x, attend)
        # Only the rows that are needed: 1.2 to 1.3 times as fast (docs/log.md).
        x = self.norm(self.blocks[-1].forward(x, attend, flat_rows if some else None))
        return x if some else x[flat_rows]

    def cached_outputs(self, state: MARState, changed: Tensor, rows: Tensor) -> Tensor:
        """Computes `outputs` with the feature cache; tokens `changed` (n, k) are new since the last step."""
        n, everything = len(state.x), state.step % self.interval == 0
        state.step += 1
        x = state.x.flatten(0, 1)
        if everything:
            heads = self.generator.spec.num_heads
            state.attends, wanted = [CachedAttention(heads, n) for _ in self.blocks], rows.flatten()
        else:
            computed = torch.cat([rows, changed], dim=1).flatten()
            x, wanted = x[computed], None
            for attend in state.attends:
                attend.rows = computed
        for block, attend in zip(self.blocks[:-1], state.attends[:-1], strict=True):
            x = block.forward(x, attend)
        x = self.norm(self.blocks[-1].forward(x, state.attends[-1], wanted))
        return x if everything else x.unflatten(0, (n, -1))[:, : rows.shape[1]].flatten(0, 1)
