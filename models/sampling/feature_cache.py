"""A feature cache for MAR's top level: approximate, opt-in (in the spirit of LazyMAR, arXiv 2503.12450).

Between two steps most tokens' features hardly change. Every `refresh` steps all of them are computed; in between only those
of patches just decided and of patches whose outputs are read, against the others' keys and values as they last were.
Letters: n sequences (halves and images), T tokens, R rows, D width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.layers import dot_product_attention
from models.mar import MARSampler, MARState
from models.noise import Noise
from models.sampling.guidance import Guidance
from models.sampling.known import KnownPixels
from models.sampling.prepare import merge_heads, split_heads


@dataclass
class LazyState(MARState):
    """Besides: the number of steps done, and each block's keys and values (n * T, 2 D)."""

    step: int = 0
    cache: list[Tensor] = field(default_factory=list)


class LazyMARSampler(MARSampler):
    """A MARSampler that computes all tokens in every `setup.refresh`-th step only."""

    def start(
        self, conds, guidance: Guidance, noise: Noise, order: Tensor, given: KnownPixels | None = None
    ) -> LazyState:
        return LazyState(**vars(super().start(conds, guidance, noise, order, given)))

    def outputs(self, state: LazyState, new: Tensor, rows: Tensor) -> Tensor:
        n, _, dim = state.x.shape
        everything = state.step % self.setup.refresh == 0
        state.step += 1
        if everything:
            state.cache = []
        else:
            rows = torch.cat([rows, new], dim=1)
        x = state.x.flatten(0, 1) if everything else state.x.flatten(0, 1)[rows.flatten()]
        for number, block in enumerate(self.blocks):
            qkv = block.qkv(block.norm1(x))
            q, kv = qkv.tensor_split([dim], dim=1)
            if everything:
                state.cache.append(kv.contiguous())
            else:
                state.cache[number].index_copy_(0, rows.flatten(), kv)
            x = block.after_attention(x, self.attend(q, state.cache[number], n))
        y = self.last.norm1(x)
        if everything:
            state.cache.append(self.last_kv(y))
            x, y = x[rows.flatten()], y[rows.flatten()]
        else:
            state.cache[-1].index_copy_(0, rows.flatten(), self.last_kv(y))
        x = self.norm(self.last.after_attention(x, self.attend(self.last_q(y), state.cache[-1], n)))
        return x.unflatten(0, (n, -1))[:, : rows.shape[1] - (0 if everything else new.shape[1])].flatten(0, 1)

    def attend(self, q: Tensor, kv: Tensor, n: int) -> Tensor:
        heads = self.generator.spec.num_heads
        k, v = split_heads(kv, n, heads, 2)
        return merge_heads(dot_product_attention(*split_heads(q, n, heads, 1), k, v))
