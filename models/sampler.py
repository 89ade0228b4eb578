"""Sampling, depth-first: the canvas loop that every generator type shares.

A level's sampler lives for one sampling call. It knows the plan in host integers, so nothing waits for the device.
Letters: N pictures at this level, p patch side, C = 3 * p * p, L patches a picture, D width, k patches decided in one
step, h halves (2 with guidance, else 1).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.given import Given
from models.guidance import Guidance
from models.noise import Noise
from models.patches import patchify, put, unpatchify
from models.prepared import Linear, Norm, Setup


class LevelSampler:
    """Draws the pictures of one level. A generator type gives it `start` and `predict`; `child` draws its patches."""

    def __init__(self, generator, child, setup: Setup):
        self.generator, self.child, self.setup = generator, child, setup
        self.reads = generator.reads or generator.spec.num_conds

    def start(self, conds: Sequence[Tensor], guidance: Guidance, noise: Noise, order: Tensor, given: Given | None = None):
        """State of N pictures, whatever `predict` wants, from conditions, each (h * N, cond_dim), and order (N, L)."""
        raise NotImplementedError

    def predict(self, state, known: Tensor | None, begin: int, end: int) -> list[Tensor]:
        """Conditions, each (h * N * k, D), of the patches at places [begin, end) of the order; rows: half, picture, patch.

        `known` (N, k', C): the patches at places [begin - k', begin), decided since the last call; None if there are none.
        """
        raise NotImplementedError

    def draw(
        self,
        conds: Sequence[Tensor],
        guidance: Guidance,
        noise: Noise,
        num_iter_list: Sequence[int],
        on_step: Callable | None = None,
        given: Given | None = None,
    ) -> Tensor:
        """Conditions, each (h * N, cond_dim), and the noise of N pictures -> normalised pictures (N, 3, H, H).

        `on_step(step, num_steps, canvas)` is called after each step with the canvas (N, 3, H, H) so far. `given` is what is
        known of the pictures, each of which has something hidden; pictures of the same plan are then drawn together.
        """
        spec, chunk = self.generator.spec, self.setup.chunk
        if spec.index > 0 and chunk is not None and len(noise) > chunk:
            parts = [some(conds, guidance, noise, given, slice(i, i + chunk)) for i in range(0, len(noise), chunk)]
            return torch.cat([self.draw(*these, num_iter_list, given=known) for *these, known in parts])
        num_iter, *deeper = num_iter_list
        if given is None:
            return self.decide(conds, guidance, noise, tuple(self.generator.plan(num_iter)), deeper, on_step, None)
        groups = list(given.groups(spec.patch_size, lambda hidden: tuple(self.generator.plan(num_iter, hidden))))
        shown = Shown(on_step, given, sum(len(plan) for plan, *_ in groups)) if on_step else None
        pictures = given.pictures.clone()
        for plan, rows, known in groups:
            *these, _ = some(conds, guidance, noise, None, rows)
            watch = shown.of(rows) if shown else None
            pictures[rows.to(pictures.device)] = self.decide(*these, plan, deeper, watch, known)
        return pictures

    def decide(self, conds, guidance, noise, plan, num_iter_list, on_step: Callable | None, given: Given | None) -> Tensor:
        """`draw`, by a plan of this level's steps; `num_iter_list` is for those below."""
        spec = self.generator.spec
        order = self.generator.order(noise, given)
        state = self.start(conds, guidance, noise, order, given)
        children, inside = noise.in_order(order), given and given.in_order(spec.patch_size, order)
        first = plan[0][0]  # patches known from the beginning
        drawn = [inside.patches[:, :first]] if first else []
        new = list(drawn)  # decided since the last prediction
        canvas = order.new_zeros(*order.shape, spec.patch_dim, dtype=self.generator.dtype) if on_step else None
        if on_step and given is not None:
            canvas = patchify(given.shown(), spec.patch_size)
        for step, (begin, end, progress) in enumerate(plan):
            here = inside and inside.step(begin, end)
            if here is not None and not here.hidden.any():
                patches = here.pictures
            else:
                handed = self.predict(state, joined(new), begin, end)
                step_guidance = guidance.at(progress).on(order.device) if spec.index == 0 else guidance
                patches = draw_hidden(self.child, handed, step_guidance, children.step(begin, end), num_iter_list, here)
                new = []
            drawn.append(patches.reshape(len(order), end - begin, spec.patch_dim))
            new.append(drawn[-1])
            if on_step is not None:
                canvas = put(canvas, order[:, begin:end], drawn[-1])
                on_step(step, len(plan), unpatchify(canvas, spec.patch_size))
        drawn = torch.cat(drawn, dim=1)
        return unpatchify(put(torch.empty_like(drawn), order, drawn), spec.patch_size)


def joined(patches: list[Tensor]) -> Tensor | None:
    """Some of (N, k, C), side by side."""
    return torch.cat(patches, dim=1) if len(patches) > 1 else patches[0] if patches else None


def some(conds, guidance: Guidance, noise: Noise, given: Given | None, rows: slice | Tensor) -> tuple:
    """The first three and `given` of what concerns the pictures `rows`, a slice or numbers on the host."""
    there = rows if isinstance(rows, slice) else rows.to(conds[0].device)
    return [guidance.part(cond, there) for cond in conds], guidance, noise.part(there), given and given.part(rows)


def draw_hidden(sampler, conds, guidance: Guidance, noise: Noise, num_iter_list, given: Given | None, on_step=None) -> Tensor:
    """`sampler.draw` for the pictures that have something hidden; the others are as given."""
    if given is None:
        return sampler.draw(conds, guidance, noise, num_iter_list, on_step)
    rows = given.incomplete()
    if len(rows) == len(given):
        return sampler.draw(conds, guidance, noise, num_iter_list, on_step, given)
    pictures = given.pictures.clone()
    if len(rows):
        *these, hidden = some(conds, guidance, noise, given, rows)
        watch = on_step and Shown(on_step, given).of(rows)
        pictures[rows.to(pictures.device)] = sampler.draw(*these, num_iter_list, watch, hidden)
    return pictures


class Shown:
    """The canvas of pictures of which some are drawn after others, or not at all, for a step callback. num_steps: of all of
    them; None: as those say that are drawn."""

    def __init__(self, on_step: Callable, given: Given, num_steps: int | None = None):
        self.on_step, self.canvas, self.num_steps, self.step = on_step, given.shown(), num_steps, 0

    def of(self, rows: Tensor) -> Callable:
        def on_step(step: int, num_steps: int, canvas: Tensor) -> None:
            self.canvas = self.canvas.index_copy(0, rows.to(canvas.device), canvas)
            self.on_step(self.step, self.num_steps or num_steps, self.canvas)
            self.step += 1

        return on_step


class TransformerSampler(LevelSampler):
    """What the samplers of AR and MAR prepare alike; `stream` is the dtype of the residual stream."""

    def __init__(self, generator, child, setup: Setup):
        super().__init__(generator, child, setup)
        dtype, self.stream = setup.dtype, generator.pos_embed_learned.dtype
        self.cond_emb, self.patch_emb = Linear.of(generator.cond_emb, dtype), Linear.of(generator.patch_emb, dtype)
        self.embedding_norm, self.norm = Norm(generator.patch_emb_ln, self.stream), Norm(generator.norm, dtype)
