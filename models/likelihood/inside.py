"""A look inside: one patch of each level followed down to its pixel (paper, 5.3).

Letters: H image side, s side of a level's image, p side of its patch, R rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from models.generator import Generator, Steps
from models.likelihood.bits import LN2, draw_steps
from models.likelihood.log_likelihood import OVERFLOW, model_images, spread, terms_in_steps
from models.noise import Noise
from models.pixelloss import PixelLoss
from models.sampling.edit import integers
from models.sampling.generate import eval_mode
from models.sampling.labels import Label, labels_of_each
from models.sampling.options import steps_of_levels
from models.sampling.precision import check_finite
from util.errors import ArgumentError, UserError, naming
from util.pixels import to_values

MAX_ROWS = 4096  # of logits at a time


@dataclass(frozen=True)
class Place:
    """Where a level decided the patch that is followed (paper, 5.3). Boxes: (x, y, side) in image pixels.

    kind        class of the level's generator
    image       the image that this level sees; patch: the patch that is followed
    step        number of the step that decided the patch, of num_steps
    known       (s, s) bool: which pixels of `image` were known before that step
    neighbours  the patches above, right, below and left, whose outputs are passed down as conditions beside
                the patch's own; None for one outside the image, which is a zero. Empty where the next level
                uses the patch's own output alone
    entropy     (3,) bits, of R, G, B in the softmax below this level: of the patch's guiding pixel, or of the
                pixel itself
    probs       (3, 256): the probabilities of that softmax; values: (3,) int64, the sampled ones. All three
                are None where there is no such softmax
    """

    kind: str
    image: tuple[int, int, int]
    patch: tuple[int, int, int]
    step: int
    num_steps: int
    known: Tensor
    neighbours: tuple[tuple[int, int, int] | None, ...]
    entropy: Tensor | None = None
    probs: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class Inside:
    """places: one for each level above the pixel. entropy: (levels above the pixel, 3, H, H) bits, of the
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
    """Follows the patches that hold `pixel` (x, y) of one image, in the sampler's steps (paper, 5.3).

    If `generate` sampled the image with that seed, index and steps, guidance_scale 1 and temperature 1, these
    are the softmaxes from which it was sampled, except that guiding pixels are the means of what was sampled
    under them. For any other image they are those of that order of patches, with the image's own pixels as
    context. Raises UserError for an argument out of range, and where softmaxes or weights are not finite.
    """
    images, side = model_images(model, image), model.img_size_list[0]
    if len(images) != 1:
        raise UserError(f"{len(images)} images; give one")
    x, y = integers("pixel", pixel, "x, y")
    if not (0 <= x < side and 0 <= y < side):
        raise ArgumentError("pixel", f"{x} {y} is not within the {side} x {side} pixels")
    labels = labels_of_each(model, class_label, 1, "class_label")
    num_iters = steps_of_levels(model, num_inference_steps)
    with naming({"indices": "index"}):
        noise = Noise.of_images(seed, [index], model.noise_sizes)
    steps = draw_steps(model, noise, num_iters)
    heads = {level: head for level, head in enumerate(softmax_heads(model)) if head is not None}
    inputs = {}  # by level: the pixels and conditions with which its head is called
    with eval_mode(model), ExitStack() as hooks:
        for level, head in heads.items():
            note = lambda _, given, level=level: inputs.update({level: given[:2]})  # noqa: E731
            hooks.enter_context(head.register_forward_pre_hook(note))
        terms_in_steps(model, images, None if labels is None else torch.tensor(labels), steps)
    entropy = torch.zeros(len(model.generators), 3, side, side)
    places, row = [], 0
    for level, generator in enumerate(model.generators):
        parent, grid, size = row, generator.spec.grid, generator.spec.patch_size
        row = parent * grid**2 + (y // size % grid) * grid + x // size % grid
        softmax = {}
        if level in heads:
            head, (pixels, conds) = heads[level], inputs[level]
            bits, values = entropies(head, pixels, conds), to_values(pixels[row : row + 1])
            entropy[level] = spread(model, bits, level + 1)[0]
            probs = head.logits(values, [cond[row : row + 1] for cond in conds])[0].softmax(-1)
            softmax = dict(entropy=bits[row], probs=probs.cpu(), values=values[0].cpu())
        next_uses = [below.num_conds for below in model.generators[level + 1 : level + 2]]
        with_neighbours = generator.num_conds_out > 1 and next_uses > [1]
        order = generator, steps[level], num_iters[level]
        places.append(place_of(*order, parent, (x, y), with_neighbours, **softmax))
    check_finite(model, entropy, OVERFLOW)
    return Inside(tuple(places), entropy)


def softmax_heads(model) -> Iterator[PixelLoss | None]:
    """The head below each level: the next level's for its guiding pixel or None, and the RGB head last."""
    for generator in model.generators[1:]:
        yield getattr(generator, "guiding_pixel_loss", None)
    while hasattr(model, "next_fractal"):
        model = model.next_fractal
    yield model


def entropies(head: PixelLoss, pixels: Tensor, conds: Sequence[Tensor]) -> Tensor:
    """Normalised pixels (R, 3) and conditions -> entropies (R, 3) in bits, on the host (paper, 5.3)."""
    found = []
    for rows in torch.arange(len(pixels), device=pixels.device).split(MAX_ROWS):
        logs = head.logits(to_values(pixels[rows]), [cond[rows] for cond in conds]).log_softmax(-1)
        found.append(-(logs.exp() * logs).sum(-1).cpu() / LN2)  # sync
    return torch.cat(found)


def place_of(
    generator: Generator,
    steps: Steps | None,
    num_iter: int,
    parent: int,
    pixel: Sequence[int],
    with_neighbours: bool,
    **softmax: Tensor,
) -> Place:
    """Where the order of patches has `pixel` (paper, 5.3); `parent` numbers the level's image with it."""
    spec = generator.spec
    (x, y), grid, size = pixel, spec.grid, spec.patch_size
    left, top = x // spec.img_size * spec.img_size, y // spec.img_size * spec.img_size
    column, row = (x - left) // size, (y - top) // size
    number = row * grid + column
    order = torch.arange(spec.num_patches) if steps is None else steps.order[parent].cpu()
    plan = [(begin, end) for begin, end, _ in generator.plan(num_iter)] if steps is None else steps.plan
    place = order.argsort()
    step = next(i for i, (_, end) in enumerate(plan) if place[number] < end)
    known = (place < plan[step][0]).view(grid, grid).repeat_interleave(size, 0).repeat_interleave(size, 1)
    around = [(column, row - 1), (column + 1, row), (column, row + 1), (column - 1, row)]
    patch, *neighbours = (
        (left + i * size, top + j * size, size) if min(i, j) >= 0 and max(i, j) < grid else None
        for i, j in [(column, row), *around]
    )
    return Place(
        kind=type(generator).__name__,
        image=(left, top, spec.img_size),
        patch=patch,
        step=step,
        num_steps=len(plan),
        known=known,
        neighbours=tuple(neighbours) if with_neighbours else (),
        **softmax,
    )
