"""Sampling, depth-first: the canvas loop that every generator type shares.

A level's sampler lives for one sampling call. It knows the plan in host integers, so nothing waits for the device.
Letters: N images at this level, p patch side, C = 3 * p * p, L patches an image, D width, k patches decided in one
step, h halves (2 with guidance, else 1).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.noise import Noise
from models.patches import patchify, put, unpatchify
from models.sampling.guidance import Guidance
from models.sampling.known import KnownPixels
from models.sampling.prepare import Linear, Norm, Setup


class LevelSampler:
    """Draws the images of one level. A generator type gives it `start` and `predict`; `child` draws its patches."""

    def __init__(self, generator, child, setup: Setup):
        self.generator, self.child, self.setup = generator, child, setup
        self.reads = generator.reads or generator.spec.num_conds

    def start(
        self,
        conds: Sequence[Tensor],
        guidance: Guidance,
        noise: Noise,
        order: Tensor,
        given: KnownPixels | None = None,
    ):
        """State of N images, whatever `predict` wants, from conditions, each (h * N, cond_dim), and order (N, L)."""
        raise NotImplementedError

    def predict(self, state, known: Tensor | None, begin: int, end: int) -> list[Tensor]:
        """Conditions, each (h * N * k, D), of the patches at places [begin, end) of the order; rows: half, image, patch.

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
        given: KnownPixels | None = None,
    ) -> Tensor:
        """Conditions, each (h * N, cond_dim), and the noise of N images -> normalised images (N, 3, H, H).

        `on_step(step, num_steps, canvas)` is called after each step with the canvas (N, 3, H, H) so far, and before it with
        those of the steps inside, down to `setup.watch_levels` levels, where these are not drawn in chunks. `given` is what is
        known of the images, each of which has something hidden; images of the same plan are then drawn together.
        """
        spec, chunk = self.generator.spec, self.setup.chunk
        if spec.index > 0 and chunk is not None and len(noise) > chunk:
            parts = [
                some(conds, guidance, noise, given, slice(i, i + chunk)) for i in range(0, len(noise), chunk)
            ]
            return torch.cat([self.draw(*these, num_iter_list, given=known) for *these, known in parts])
        num_iter, *deeper = num_iter_list
        if given is None:
            return self.decide(
                conds, guidance, noise, tuple(self.generator.plan(num_iter)), deeper, on_step, None
            )
        groups = list(
            given.groups(spec.patch_size, lambda hidden: tuple(self.generator.plan(num_iter, hidden)))
        )
        shown, num_steps, done = on_step and Shown(on_step, given), sum(len(plan) for plan, *_ in groups), 0
        images = given.images.clone()
        for plan, rows, known in groups:
            *these, _ = some(conds, guidance, noise, None, rows)
            watch = shown and shown.of(rows, done, num_steps)
            images[rows.to(images.device)] = self.decide(*these, plan, deeper, watch, known)
            done += len(plan)
        return images

    def first_canvas(self, state, order: Tensor, given: KnownPixels | None) -> Tensor:
        """What a step callback sees of N images before the first step: patches (N, L, C), grey where nothing is known."""
        if given is not None:
            return patchify(given.shown(), self.generator.spec.patch_size)
        return order.new_zeros(*order.shape, self.generator.spec.patch_dim, dtype=self.generator.dtype)

    def decide(
        self, conds, guidance, noise, plan, num_iter_list, on_step: Callable | None, given: KnownPixels | None
    ) -> Tensor:
        """`draw`, by a plan of this level's steps; `num_iter_list` is for those below."""
        spec = self.generator.spec
        order = self.generator.order(noise, given)
        state = self.start(conds, guidance, noise, order, given)
        children, inside = noise.in_order(order), given and given.in_order(spec.patch_size, order)
        first = plan[0][0]  # patches known from the beginning
        drawn = [inside.patches[:, :first]] if first else []
        new = list(drawn)  # decided since the last prediction
        canvas = self.first_canvas(state, order, given) if on_step else None
        for step, (begin, end, progress) in enumerate(plan):
            here = inside and inside.step(begin, end)
            if here is not None and not here.hidden.any():
                patches = here.images
            else:
                handed = self.predict(state, joined(new), begin, end)
                step_guidance = guidance.at(progress).on(order.device) if spec.index == 0 else guidance
                inner = None
                if on_step is not None and spec.index + 1 < self.setup.watch_levels:
                    inner = within(on_step, step, len(plan), canvas, order[:, begin:end], spec.patch_size)
                patches = draw_hidden(
                    self.child, handed, step_guidance, children.step(begin, end), num_iter_list, here, inner
                )
                new = []
            drawn.append(patches.reshape(len(order), end - begin, spec.patch_dim))
            new.append(drawn[-1])
            if on_step is not None:
                canvas = put(canvas, order[:, begin:end], drawn[-1])
                on_step(step, len(plan), unpatchify(canvas, spec.patch_size))
        drawn = torch.cat(drawn, dim=1)
        return unpatchify(put(torch.empty_like(drawn), order, drawn), spec.patch_size)


def within(
    on_step: Callable, step: int, num_steps: int, canvas: Tensor, where: Tensor, patch_size: int
) -> Callable:
    """The step callback of the level below: shows `canvas` (N, L, C) with its images at the patches `where` (N, k)."""

    def inner(_step: int, _num_steps: int, images: Tensor) -> None:
        grown = put(canvas, where, images.reshape(*where.shape, -1))
        on_step(step, num_steps, unpatchify(grown, patch_size))

    return inner


def joined(patches: list[Tensor]) -> Tensor | None:
    """Some of (N, k, C), side by side."""
    return torch.cat(patches, dim=1) if len(patches) > 1 else patches[0] if patches else None


def some(conds, guidance: Guidance, noise: Noise, given: KnownPixels | None, rows: slice | Tensor) -> tuple:
    """The first three and `given` of what concerns the images `rows`, a slice or ascending numbers on the host."""
    if not isinstance(rows, slice) and len(rows) == len(noise):
        return conds, guidance, noise, given
    there = rows if isinstance(rows, slice) else rows.to(conds[0].device)
    return (
        [guidance.part(cond, there) for cond in conds],
        guidance,
        noise.part(there),
        given and given.part(rows),
    )


def draw_hidden(
    sampler, conds, guidance: Guidance, noise: Noise, num_iter_list, given: KnownPixels | None, on_step=None
) -> Tensor:
    """`sampler.draw` for the images that have something hidden; the others are as given."""
    if given is None:
        return sampler.draw(conds, guidance, noise, num_iter_list, on_step)
    rows = given.incomplete()
    if len(rows) == len(given):
        return sampler.draw(conds, guidance, noise, num_iter_list, on_step, given)
    images = given.images.clone()
    if len(rows):
        *these, hidden = some(conds, guidance, noise, given, rows)
        on_step = on_step and Shown(on_step, given).of(rows)
        images[rows.to(images.device)] = sampler.draw(*these, num_iter_list, on_step, hidden)
    return images


class Shown:
    """The canvas of images of which some are drawn after others, or not at all, for a step callback."""

    def __init__(self, on_step: Callable, given: KnownPixels):
        self.on_step, self.canvas = on_step, given.shown()

    def of(self, rows: Tensor, done: int = 0, of_all: int | None = None) -> Callable:
        """The callback of the images `rows`, before whose steps `done` of `of_all` have been made for others."""

        def on_step(step: int, num_steps: int, canvas: Tensor) -> None:
            self.canvas = self.canvas.index_copy(0, rows.to(canvas.device), canvas)
            self.on_step(done + step, of_all or num_steps, self.canvas)

        return on_step


class TransformerSampler(LevelSampler):
    """What the samplers of AR and MAR prepare alike; `stream` is the dtype of the residual stream."""

    def __init__(self, generator, child, setup: Setup):
        super().__init__(generator, child, setup)
        dtype, self.stream = setup.dtype, generator.pos_embed_learned.dtype
        self.cond_emb, self.patch_emb = (
            Linear.of(generator.cond_emb, dtype),
            Linear.of(generator.patch_emb, dtype),
        )
        self.embedding_norm, self.norm = (
            Norm(generator.patch_emb_ln, self.stream),
            Norm(generator.norm, dtype),
        )
