"""How an AR level decides its next patch (docs/format.md, "AR levels"): one token a step, with the keys and
values of the earlier tokens in a cache.

Letters: N images, L patches, D width, h halves (2 with guidance, otherwise 1), M = h * N
sequences, T tokens, S keys, d width of a head.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ar import AR
from models.attention import merge_heads, rotate_
from models.sampling.canvas import Batch, Sampler, TransformerSampler, register_sampler
from models.sampling.prepare import Setup, prepare_block


@dataclass
class ARState:
    """The state of an AR level's images (docs/format.md, "AR levels").

    condition  (M, D), embedded
    cache      (blocks, 2, M, heads, L, d), the keys and values of the tokens so far
    halves     h
    begun      whether the condition is among these tokens
    """

    condition: Tensor
    cache: Tensor
    halves: int
    begun: bool = False


@register_sampler(AR)
class ARSampler(TransformerSampler):
    """Runs one token a step (docs/format.md, "AR levels"); patches known from the beginning run together."""

    def __init__(self, ar: AR, child: Sampler, setup: Setup):
        super().__init__(ar, child, setup)
        self.blocks = [prepare_block(block, setup.dtype) for block in ar.blocks]
        self.pos = ar.pos_embed_learned[0].detach()
        # (1 + L, 1, 1, d / 2)
        self.rotation = torch.complex(ar.rope_cos.float(), ar.rope_sin.float())[:, None, None]
        self.places = torch.arange(ar.spec.num_patches, device=self.pos.device)
        self.run = setup.compile(ARSampler._run, self.pos.device)

    @staticmethod
    def tokens_in_step(generator: AR) -> int:
        return 1

    def start(self, batch: Batch, order: Tensor) -> ARState:
        condition, spec = self.cond_emb(batch.conds[0].to(self.setup.dtype)), self.generator.spec
        head_dim = spec.embed_dim // spec.num_heads
        shape = (spec.num_blocks, 2, len(condition), spec.num_heads, spec.num_patches, head_dim)
        cache = condition.new_zeros(shape) if self.setup.options.compiled else condition.new_empty(shape)
        return ARState(condition, cache, 2 if batch.guidance.doubled else 1)

    def predict(self, state: ARState, new: Tensor | None, begin: int, end: int) -> list[Tensor]:
        """As `LevelSampler.predict`: runs the new tokens and returns the output at the last of them."""
        tokens = [state.condition[:, None]] if new is None or not state.begun else []
        state.begun = True
        if new is not None:
            embedded = self.embed(new).unflatten(0, new.shape[:2])
            tokens.append(embedded.repeat(state.halves, 1, 1))
        x = tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)
        if x.shape[1] > 1:
            return [self._run(x, slice(end - x.shape[1], end), state.cache)]
        places = self.places[begin:end] if self.setup.options.compiled else slice(begin, end)
        return [self.run(self, x, places, state.cache)]

    def _run(self, x: Tensor, places: slice | Tensor, cache: Tensor) -> Tensor:
        """Computes the outputs (M, D) at the last of the embedded tokens (M, T, D) number `places`.

        A place in a tensor keeps all shapes the same, so that what is compiled for one place fits all:
        queries then see the whole cache through a mask.
        """
        num_tokens, mask = x.shape[1], None
        if not isinstance(places, slice):
            mask = (self.places <= places)[None]
        elif num_tokens > 1:
            mask = self.places[: places.stop] <= self.places[places, None]
        rotation = self.rotation[places]
        x = self.embedding_norm((x.to(self.stream) + self.pos[places]).flatten(0, 1))
        for block, block_cache in zip(self.blocks, cache.unbind(0), strict=True):
            x = block.forward(x, partial(attend_to_cache, block_cache, places, rotation, mask))
        return self.norm(x if num_tokens == 1 else x.unflatten(0, (-1, num_tokens))[:, -1])


def attend_to_cache(
    cache: Tensor, places: slice | Tensor, rotation: Tensor, mask: Tensor | None, qkv: Tensor
) -> Tensor:
    """Attention of the next T tokens of each sequence to the cached tokens and to themselves.

    cache     (2, M, heads, L, d), to which their keys and values are added
    places    the numbers of the tokens, as a slice or (T,) int64
    rotation  cos + i sin of their positions, (T, 1, 1, d / 2) complex (docs/format.md, "AR levels")
    mask      (T, S): which of the cache's first S tokens each of them sees; None: all
    qkv       (M * T, 3 D), their queries, keys and values
    """
    qkv = qkv.view(cache.shape[1], len(rotation), 3, cache.shape[2], -1)  # (M, T, 3, heads, d)
    turned = rotate_(qkv.float(), rotation).permute(2, 0, 3, 1, 4)  # (3, M, heads, T, d)
    if isinstance(places, slice):
        cache[:, :, :, places] = turned[1:]
        cache = cache[:, :, :, : places.stop]
    else:
        cache.index_copy_(3, places, turned[1:].to(cache.dtype))
    k, v = cache.unbind(0)
    return merge_heads(F.scaled_dot_product_attention(turned[0].to(k.dtype), k, v, mask))
