"""A look inside: one patch of each level followed down to its pixel (paper, 5.3).

Letters: C channels, V values, S an image's sides, s those of a level's image, R rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from models.generator import Generator, Steps
from models.likelihood.bits import LN2, draw_steps
from models.likelihood.log_likelihood import OVERFLOW, model_images, pixels_together, spread, terms_in_steps
from models.patches import neighbour_offsets
from models.pixelloss import PixelLoss
from models.sampling.edit import PLACES, integers
from models.sampling.generate import eval_mode
from models.sampling.labels import Label, labels_of_each
from models.sampling.options import steps_of_levels
from models.sampling.precision import check_finite
from util.errors import ArgumentError, UserError, naming
from util.pixels import in_words, swapped

MAX_ROWS = 4096  # of logits at a time


@dataclass(frozen=True)
class Place:
    """Where a level decided the patch that is followed (paper, 5.3). Boxes are as `box_mask` takes them.

    kind        class of the level's generator
    image       the image that this level sees; patch: the patch that is followed
    step        number of the step that decided the patch, of num_steps
    known       (*s) bool: which pixels of `image` were known before that step
    neighbours  the patches at `neighbour_offsets` (above, right, below, left), whose outputs are passed down
                as conditions beside the patch's own; None for one outside the image, which is a zero. Empty
                where the next level uses the patch's own output alone
    entropy     (C,) bits, of the channels in the softmax below this level: of the patch's guiding pixel, or
                of the pixel itself
    probs       (C, V): the probabilities of that softmax; values: (C,) int64, the sampled ones. All three
                are None where there is no such softmax
    """

    kind: str
    image: tuple[int, ...]
    patch: tuple[int, ...]
    step: int
    num_steps: int
    known: Tensor
    neighbours: tuple[tuple[int, ...] | None, ...]
    entropy: Tensor | None = None
    probs: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class Inside:
    """places: one for each level above the pixel. entropy: (levels above the pixel, C, *S) bits, of the
    softmax below each level, 0 where there is none; a guiding pixel's is spread over its patch."""

    places: tuple[Place, ...]
    entropy: Tensor


@torch.no_grad()
def look_inside(
    model,
    image,
    pixel: Sequence[int],
    class_label: Label | None = None,
    *,
    num_inference_steps: Sequence[int] | None = None,
    seed: int = 0,
    index: int = 0,
) -> Inside:
    """Follows the patches that hold `pixel` of one image, in the sampler's steps (paper, 5.3).

    The pixel is (x, y), or with another number of axes a place as in `edit.PLACES`.

    If `generate` sampled the image with that seed, index and steps, guidance_scale 1 and temperature 1, these
    are the softmaxes from which it was sampled, except that guiding pixels are the means of what was sampled
    under them. For any other image they are those of that order of patches, with the image's own pixels as
    context. Raises UserError for an argument out of range, and where softmaxes or weights are not finite.
    """
    images, shape = model_images(model, image), model.image_shape
    if len(images) != 1:
        raise UserError(f"{len(images)} images; give one")
    cell = swapped(integers("pixel", pixel, PLACES[len(shape)]))
    if not all(0 <= place < side for place, side in zip(cell, shape, strict=True)):
        said = " ".join(map(str, swapped(cell)))
        raise ArgumentError("pixel", f"{said} is not within the {in_words(shape)}")
    labels = labels_of_each(model, class_label, 1, "class_label")
    num_iters = steps_of_levels(model, num_inference_steps)
    with naming({"indices": "index"}):
        noise = model.noise(seed, [index])
    steps = draw_steps(model, noise, num_iters)
    heads = {level: head for level, head in enumerate(softmax_heads(model)) if head is not None}
    inputs = {}  # by level: the pixels and conditions with which its head is called
    with eval_mode(model), ExitStack() as hooks:
        for level, head in heads.items():
            note = lambda _, given, level=level: inputs.update({level: given[:2]})  # noqa: E731
            hooks.enter_context(head.register_forward_pre_hook(note))
        terms_in_steps(model, images, None if labels is None else torch.tensor(labels), steps)
    entropy = torch.zeros(len(model.generators), *images.shape[1:])
    places, row = [], 0
    for level, generator in enumerate(model.generators):
        for place, side, grid in zip(cell, generator.spec.patch_size, generator.spec.grid, strict=True):
            row = row * grid + place // side % grid
        softmax = {}
        if level in heads:
            head, (pixels, conds) = heads[level], inputs[level]
            bits, values = entropies(head, pixels, conds), model.alphabet.to_values(pixels[row : row + 1])
            entropy[level] = spread(model, bits, level + 1)[0]
            probs = head.logits(values, [cond[row : row + 1] for cond in conds])[0].softmax(-1)
            softmax = dict(entropy=bits[row], probs=probs.cpu(), values=values[0].cpu())
        next_uses = [below.num_conds for below in model.generators[level + 1 : level + 2]]
        with_neighbours = generator.num_conds_out != 1 and next_uses > [1]
        order = generator, steps[level], num_iters[level]
        places.append(place_of(*order, row, cell, with_neighbours, **softmax))
    check_finite(model, entropy, OVERFLOW)
    return Inside(tuple(places), entropy)


def softmax_heads(model) -> Iterator[PixelLoss | None]:
    """The head below each level: the next level's for its guiding pixel or None, and the head last."""
    for generator in model.generators[1:]:
        yield getattr(generator, "guiding_pixel_loss", None)
    while hasattr(model, "next_fractal"):
        model = model.next_fractal
    yield model


def entropies(head: PixelLoss, pixels: Tensor, conds: Sequence[Tensor]) -> Tensor:
    """Normalised pixels (R, C) and conditions -> entropies (R, C) in bits, on the host (paper, 5.3)."""
    found = []
    together = pixels_together(head.alphabet, MAX_ROWS)
    for rows in torch.arange(len(pixels), device=pixels.device).split(together):
        values = head.alphabet.to_values(pixels[rows])
        logs = head.logits(values, [cond[rows] for cond in conds]).log_softmax(-1)
        found.append(-(logs.exp() * logs).sum(-1).cpu() / LN2)  # sync
    return torch.cat(found)


def place_of(
    generator: Generator,
    steps: Steps | None,
    num_iter: int,
    row: int,
    cell: Sequence[int],
    with_neighbours: bool,
    **softmax: Tensor,
) -> Place:
    """Where the order of patches has patch number `row` of all that the level passes down (paper, 5.3).

    It is the patch that holds `cell`, which has its axes in the order of arrays.
    """
    spec = generator.spec
    parent, number = divmod(row, spec.num_patches)
    corner = [place // side * side for place, side in zip(cell, spec.img_size, strict=True)]
    own = [place // side % grid for place, side, grid in zip(cell, spec.patch_size, spec.grid, strict=True)]
    order = torch.arange(spec.num_patches) if steps is None else steps.order[parent].cpu()
    plan = [(begin, end) for begin, end, _ in generator.plan(num_iter)] if steps is None else steps.plan
    place = order.argsort()
    step = next(i for i, (_, end) in enumerate(plan) if place[number] < end)
    known = (place < plan[step][0]).view(spec.grid)
    for axis, side in enumerate(spec.patch_size):
        known = known.repeat_interleave(side, axis)

    def box(step: Sequence[int]) -> tuple[int, ...] | None:
        """The box of the patch at `step` from this one; None outside the image."""
        there = [at + by for at, by in zip(own, step, strict=True)]
        if not all(0 <= at < grid for at, grid in zip(there, spec.grid, strict=True)):
            return None
        begin = [first + at * side for first, at, side in zip(corner, there, spec.patch_size, strict=True)]
        return *swapped(begin), *swapped(spec.patch_size)

    return Place(
        kind=type(generator).__name__,
        image=(*swapped(corner), *swapped(spec.img_size)),
        patch=box([0] * len(own)),
        step=step,
        num_steps=len(plan),
        known=known,
        neighbours=tuple(map(box, neighbour_offsets(len(own)))) if with_neighbours else (),
        **softmax,
    )
