"""Depth-first sampling: the loop over the steps of a level, which all generator types share (paper, 3.2 and
4.1; docs/format.md, "Sampling").

A level's sampler lives for one sampling call. Its plan consists of integers on the host, so that nothing
waits for the device. Letters: N images of this level, C channels, S an image's sides, p a patch's sides (one
number for each axis), P cells of a patch, L patches of an image, D width, k patches of one step, h halves (2
with guidance, otherwise 1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from models.generator import Generator, LevelSpec
from models.noise import Noise
from models.patches import Shape, patchify, put, unpatchify
from models.sampling.guidance import Guidance
from models.sampling.known import GroupCallback, KnownPixels, OnStep
from models.sampling.prepare import FastLayerNorm, FastLinear, Setup


@dataclass(frozen=True)
class Batch:
    """N images of one level that are sampled together, and all that decides them (paper, 3.2).

    conds      conditions, each (h * N, cond_dim): with guidance the class-conditional half comes first
    guidance   how logits become values
    noise      the random numbers of the images
    num_iters  the numbers of steps of this level and of the levels below it
    known      the known pixels of the images and the constraint on the others; None: there are neither
    on_step    called with (step, number of steps, canvas (N, C, *S)) after each step of this level, or None
    """

    conds: Sequence[Tensor]
    guidance: Guidance
    noise: Noise
    num_iters: tuple[int, ...] = ()
    known: KnownPixels | None = None
    on_step: OnStep | None = None

    def __len__(self) -> int:
        return len(self.noise)

    def part(self, rows: slice | Tensor, on_step: OnStep | None = None) -> "Batch":
        """Selects some of the images, by a slice or by ascending numbers (int64) on the host."""
        known = self.known.part(rows) if self.known is not None else None
        if not isinstance(rows, slice) and len(rows) == len(self):
            return replace(self, known=known, on_step=on_step)
        there = rows if isinstance(rows, slice) else rows.to(self.conds[0].device, non_blocking=True)
        conds = [self.guidance.part(cond, there) for cond in self.conds]
        return replace(self, conds=conds, noise=self.noise.part(there), known=known, on_step=on_step)


class Sampler:
    """Samples images of one size: of a level, or single pixels (paper, 3.2).

    num_conds   the number of conditions that it uses
    patch_size  the sides of the patches that its plan counts
    max_images  the largest number of images that are sampled together; None: no limit
    """

    num_conds: int
    patch_size: Shape
    max_images: int | None = None

    def plan(self, num_iters: Sequence[int], hidden: int | None = None) -> tuple:
        """The steps for images that have `hidden` patches to sample; None: all patches."""
        raise NotImplementedError

    def draw(self, batch: Batch, plan: tuple) -> Tensor:
        """Samples normalised images (N, C, *S), float32, which all take the steps of `plan`."""
        raise NotImplementedError

    def sample(self, batch: Batch) -> Tensor:
        """Samples normalised images (N, C, *S). Known pixels stay; images wholly known take no time."""
        if self.max_images is not None and len(batch) > self.max_images:
            parts = range(0, len(batch), self.max_images)
            return torch.cat([self.sample(batch.part(slice(i, i + self.max_images))) for i in parts])
        if batch.known is None:
            return self.draw(batch, self.plan(batch.num_iters))
        images = batch.known.images.clone()
        groups = list(batch.known.groups(self.patch_size, partial(self.plan, batch.num_iters)))
        callback = (
            GroupCallback(batch.on_step, batch.known, sum(len(plan) for plan, _ in groups))
            if batch.on_step is not None
            else None
        )
        for plan, rows in groups:
            on_step = callback.group(rows, len(plan)) if callback is not None else None
            there = rows.to(images.device, non_blocking=True)
            images[there] = self.draw(batch.part(rows, on_step), plan)
        return images


class LevelSampler(Sampler):
    """Samples images of one level (F2); `child` samples their patches. Types give `start`, `predict`."""

    def __init__(self, generator: Generator, child: Sampler, setup: Setup):
        self.generator, self.child, self.setup = generator, child, setup
        self.num_conds, self.patch_size = generator.num_conds, generator.spec.patch_size
        if generator.spec.index > 0:
            self.max_images = setup.options.chunk

    @staticmethod
    def tokens_in_step(generator: Generator) -> int:
        """How many tokens of an image go through the transformer in a step, on average."""
        return generator.spec.num_patches

    def start(self, batch: Batch, order: Tensor):
        """Makes the state that `predict` needs; `order` (N, L) holds patch numbers."""
        raise NotImplementedError

    def predict(self, state, new: Tensor | None, begin: int, end: int) -> list[Tensor]:
        """Computes the conditions of the patches at places [begin, end) of the order, each (h * N * k, D).

        Their rows go through halves, then images, then patches. `new` (N, k', C * P) holds the patches at
        places [begin - k', begin), which were decided since the last call; None if there are none.
        """
        raise NotImplementedError

    def plan(self, num_iters: Sequence[int], hidden: int | None = None) -> tuple:
        return tuple(self.generator.plan(num_iters[0], hidden))

    def first_canvas(self, state, batch: Batch) -> Tensor:
        """What a step callback sees first: images (N, C, *S), the mean where nothing is known."""
        if batch.known is not None:
            return batch.known.shown()
        spec = self.generator.spec
        return torch.zeros(len(batch), spec.alphabet.channels, *spec.img_size, device=batch.conds[0].device)

    def draw(self, batch: Batch, plan: tuple) -> Tensor:
        """Runs the steps of a level (docs/format.md, "Sampling"), each down to the pixels."""
        spec, guidance = self.generator.spec, batch.guidance
        uniforms, precedence = batch.noise.order_uniforms, None
        if batch.known is not None:
            precedence = batch.known.precedence(spec.patch_size).to(uniforms.device, non_blocking=True)
        order = self.generator.order(uniforms, precedence)  # (N, L)
        state = self.start(batch, order)
        canvas = Canvas(batch, order, spec, plan)
        if batch.on_step is not None:
            canvas.show(self.first_canvas(state, batch), spec.index + 1 < self.setup.options.watch_levels)
        for begin, end, progress in plan:
            patches = canvas.known_patches(begin, end)
            if patches is None:
                conds = self.predict(state, canvas.take_new(), begin, end)
                if spec.index == 0:
                    guidance = batch.guidance.at(progress, order.device)
                patches = self.child.sample(canvas.children(begin, end, conds, guidance))
            canvas.put(patches)
        return canvas.images()


class Canvas:
    """The patches of a batch in the order of decision (F2), which the level below gets step by step."""

    def __init__(self, batch: Batch, order: Tensor, spec: LevelSpec, plan: tuple):
        self.batch, self.order, self.spec, self.plan = batch, order, spec, plan
        self.noise = batch.noise.in_order(order)
        self.known = batch.known.in_order(spec.patch_size, order) if batch.known is not None else None
        first = plan[0][0]  # the number of patches that are known from the beginning
        self.decided = [self.known.patches[:, :first]] if first else []
        self.new = list(self.decided)  # decided since the last prediction
        self.step, self.shown, self.shows_within = 0, None, False

    def known_patches(self, begin: int, end: int) -> Tensor | None:
        """The images of the patches at places [begin, end) if all of their pixels are known, else None."""
        if self.known is None or self.known.hidden[:, begin:end].any():
            return None
        return self.known.step(begin, end).images

    def take_new(self) -> Tensor | None:
        """The patches (N, k, C * P) that were decided since the last call; None if there are none."""
        new, self.new = self.new, []
        return torch.cat(new, dim=1) if len(new) > 1 else new[0] if new else None

    def children(self, begin: int, end: int, conds: Sequence[Tensor], guidance: Guidance) -> Batch:
        """Makes the patches at places [begin, end) a batch of the next level (F1)."""
        known = self.known.step(begin, end) if self.known is not None else None
        on_step = partial(self.show_within, self.order[:, begin:end]) if self.shows_within else None
        return Batch(conds, guidance, self.noise.step(begin, end), self.batch.num_iters[1:], known, on_step)

    def put(self, patches: Tensor) -> None:
        """Takes the next step's patches (N * k, C, *p), and calls the step callback."""
        begin, end, _ = self.plan[self.step]
        patches = patches.reshape(len(self.order), end - begin, -1)
        self.decided.append(patches)
        self.new.append(patches)
        if self.shown is not None:
            self.shown = put(self.shown, self.order[:, begin:end], patches)
            self.batch.on_step(self.step, len(self.plan), self.join(self.shown))
        self.step += 1

    def images(self) -> Tensor:
        """Joins all patches to images (N, C, *S), after the last step."""
        decided = torch.cat(self.decided, dim=1)
        return self.join(put(torch.empty_like(decided), self.order, decided))

    def join(self, patches: Tensor) -> Tensor:
        """Joins patches (N, L, C * P), in the grid's order, to images (N, C, *S)."""
        return unpatchify(patches, self.spec.grid, self.spec.patch_size)

    def show(self, images: Tensor, within: bool) -> None:
        """Starts to show patches on these images; with `within` also after each step of the level below."""
        self.shown, self.shows_within = patchify(images, self.spec.patch_size), within

    def show_within(self, where: Tensor, _step: int, _num_steps: int, images: Tensor) -> None:
        """The step callback of the level below: shows images (N * k, C, *p) at patches `where` (N, k)."""
        grown = put(self.shown, where, images.reshape(*where.shape, -1))
        self.batch.on_step(self.step, len(self.plan), self.join(grown))


class TransformerSampler(LevelSampler):
    """Prepares what AR and MAR samplers share (paper, 3.2); `stream` is the residual stream's dtype."""

    def __init__(self, generator: Generator, child: Sampler, setup: Setup):
        super().__init__(generator, child, setup)
        dtype, self.stream = setup.dtype, generator.pos_embed_learned.dtype
        self.cond_emb, self.patch_emb = (
            FastLinear.of(x, dtype) for x in (generator.cond_emb, generator.patch_emb)
        )
        self.patch_inputs = generator.patch_emb.inputs
        self.embedding_norm = FastLayerNorm(generator.patch_emb_ln, self.stream)
        self.norm = FastLayerNorm(generator.norm, dtype)

    def embed(self, patches: Tensor) -> Tensor:
        """Embeds patches (N, k, C * P) in the dtype of matrix products: (N * k, D)."""
        return self.patch_emb(self.patch_inputs(patches.flatten(0, 1)).to(self.setup.dtype))


SAMPLERS: dict[type[Generator], type[LevelSampler]] = {}


def register_sampler(generator: type[Generator]) -> Callable:
    """Class decorator: the sampler of a generator class and of its subclasses (paper, 3.2)."""

    def add(sampler):
        SAMPLERS[generator] = sampler
        return sampler

    return add


def sampler_class(generator: Generator) -> type[LevelSampler]:
    """The class that is registered for the generator's type or, failing that, for its nearest base class."""
    return next(SAMPLERS[kind] for kind in type(generator).__mro__ if kind in SAMPLERS)
