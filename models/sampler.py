"""Sampling, depth-first: the canvas loop that every generator type shares.

A level's sampler lives for one sampling call. It knows the plan in host integers, so nothing waits for the device.
Letters: N pictures at this level, p patch side, C = 3 * p * p, L patches a picture, D width, k patches decided in one
step, h halves (2 with guidance, else 1).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.guidance import Guidance
from models.noise import Noise
from models.patches import put, unpatchify
from models.prepared import Linear, Norm, Setup


class LevelSampler:
    """Draws the pictures of one level. A generator type gives it `start` and `predict`; `child` draws its patches."""

    def __init__(self, generator, child, setup: Setup):
        self.generator, self.child, self.setup = generator, child, setup
        self.reads = generator.reads or generator.spec.num_conds

    def start(self, conds: Sequence[Tensor], guidance: Guidance, noise: Noise, order: Tensor):
        """State of N pictures, whatever `predict` wants, from conditions, each (h * N, cond_dim), and order (N, L)."""
        raise NotImplementedError

    def predict(self, state, known: Tensor | None, begin: int, end: int) -> list[Tensor]:
        """Conditions, each (h * N * k, D), of the patches at places [begin, end) of the order; rows: half, picture, patch.

        `known` (N, k', C): the patches at places [begin - k', begin), decided since the last call; None at the first.
        """
        raise NotImplementedError

    def draw(
        self,
        conds: Sequence[Tensor],
        guidance: Guidance,
        noise: Noise,
        num_iter_list: Sequence[int],
        on_step: Callable | None = None,
    ) -> Tensor:
        """Conditions, each (h * N, cond_dim), and the noise of N pictures -> normalised pictures (N, 3, H, H).

        `on_step(step, num_steps, canvas)` is called after each step with the canvas (N, 3, H, H) so far.
        """
        spec, chunk = self.generator.spec, self.setup.chunk
        if spec.index > 0 and chunk is not None and len(noise) > chunk:
            parts = range(0, len(noise), chunk)
            rows = [[guidance.part(cond, slice(i, i + chunk)) for cond in conds] for i in parts]
            noises = [noise.part(slice(i, i + chunk)) for i in parts]
            return torch.cat([self.draw(c, guidance, n, num_iter_list) for c, n in zip(rows, noises, strict=True)])
        num_iter, *deeper = num_iter_list
        order = self.generator.order(noise)
        state = self.start(conds, guidance, noise, order)
        children = noise.in_order(order)
        canvas = order.new_zeros(*order.shape, spec.patch_dim, dtype=self.generator.dtype) if on_step else None
        steps, drawn = list(self.generator.plan(num_iter)), []
        for step, (begin, end, progress) in enumerate(steps):
            handed = self.predict(state, drawn[-1] if drawn else None, begin, end)
            step_guidance = guidance.at(progress).on(order.device) if spec.index == 0 else guidance
            patches = self.child.draw(handed, step_guidance, children.step(begin, end), deeper)  # (N * k, 3, p, p)
            drawn.append(patches.reshape(len(order), end - begin, spec.patch_dim))
            if on_step is not None:
                canvas = put(canvas, order[:, begin:end], drawn[-1])
                on_step(step, len(steps), unpatchify(canvas, spec.patch_size))
        drawn = torch.cat(drawn, dim=1)
        return unpatchify(put(torch.empty_like(drawn), order, drawn), spec.patch_size)


class TransformerSampler(LevelSampler):
    """What the samplers of AR and MAR prepare alike; `stream` is the dtype of the residual stream."""

    def __init__(self, generator, child, setup: Setup):
        super().__init__(generator, child, setup)
        dtype, self.stream = setup.dtype, generator.pos_embed_learned.dtype
        self.cond_emb, self.patch_emb = Linear.of(generator.cond_emb, dtype), Linear.of(generator.patch_emb, dtype)
        self.embedding_norm, self.norm = Norm(generator.patch_emb_ln, self.stream), Norm(generator.norm, dtype)
