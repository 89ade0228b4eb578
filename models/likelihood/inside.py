"""Looking inside: one patch of each level followed down to its pixel, and how sure each softmax was.

Letters: H image side, s side of a level's image, p of its patch, R rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from models.generator import Generator, Steps
from models.likelihood.bits import LN2, draw_steps
from models.likelihood.log_likelihood import model_images, read_in_steps, spread
from models.noise import Noise
from models.sampling.generate import check_labels, eval_mode, validate_num_iters
from util.errors import UserError
from util.pixels import to_values

ROWS = 4096  # of logits at a time


@dataclass(frozen=True)
class Place:
    """Where a level's patch was decided. Boxes are (x, y, side) in pixels of the whole image.

    image     what this level sees; patch: the one that is followed
    step        number of the step that decided the patch, of num_steps
    known       (s, s) bool: which pixels of `image` were known before that step
    neighbours  the patches above, right, below, left, whose outputs go down as conditions beside the patch's own; None outside
                the image: a zero. Empty where the next level reads the patch's own alone
    entropy     (3,) bits, of R, G, B in the softmax below this level: of the patch's guiding pixel, or of the pixel itself
    probs       (3, 256), what that softmax said; levels: (3,) int64, what was drawn. None where there is no such softmax
    """

    kind: str
    image: tuple[int, int, int]
    patch: tuple[int, int, int]
    step: int
    num_steps: int
    known: Tensor
    neighbours: tuple[tuple[int, int, int] | None, ...]
    entropy: Tensor | None
    probs: Tensor | None
    levels: Tensor | None


@dataclass(frozen=True)
class Inside:
    """places: one for each level above the pixel. entropy: (levels above the pixel, 3, H, H) bits, of the softmax below each
    level, 0 where there is none; a guiding pixel's stands all over its patch."""

    places: tuple[Place, ...]
    entropy: Tensor


@torch.no_grad()
def look_inside(
    model,
    image,
    pixel: Sequence[int],
    class_label: int | None = None,
    *,
    num_inference_steps: Sequence[int] | None = None,
    seed: int = 0,
    index: int = 0,
) -> Inside:
    """Follows the patches that hold `pixel` (x, y) of one image down, in the sampler's steps for image `index` of `seed`.

    For an image that `generate` drew with that seed, index and steps, guidance_scale and temperature 1, these are the
    softmaxes that it was drawn from, up to what guiding pixels then differ from the means of what was drawn under them; for any
    other, those of that order of patches, with the image's own pixels as what came before.
    Raises ValueError for what is out of range.
    """
    image, side = model_images(model, image), model.img_size_list[0]
    if len(image) != 1:
        raise UserError(f"{len(image)} images; give one")
    x, y = pixel
    if not (0 <= x < side and 0 <= y < side):
        raise UserError(f"pixel {x} {y} is not within the {side} x {side} pixels")
    labels = check_labels(class_label, model.class_num)
    num_iters = (
        model.sampling_defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
    )
    validate_num_iters(num_iters, len(model.generators))
    steps = draw_steps(model, Noise.of_images(seed, [index], model.noise_sizes), num_iters)
    heads = {level: head for level, head in enumerate(softmax_heads(model)) if head is not None}
    with eval_mode(model), inputs_of(heads) as given:
        read_in_steps(model, image, None if labels is None else torch.tensor(labels), steps)
    entropy = torch.zeros(len(model.generators), 3, side, side)
    places, row = [], 0
    for level, generator in enumerate(model.generators):
        parent, grid, size = row, generator.spec.grid, generator.spec.patch_size
        row = parent * grid**2 + (y // size % grid) * grid + x // size % grid
        found = dict(entropy=None, probs=None, levels=None)
        if level in heads:
            entropy[level] = spread(model, entropies(heads[level], *given[level]), level + 1)[0]
            found = softmax_of(heads[level], *given[level], row)
        reads = [below.reads or below.spec.num_conds for below in model.generators[level + 1 : level + 2]]
        many = generator.num_conds_out > 1 and reads > [1]
        places.append(place_of(generator, steps[level], num_iters[level], parent, (x, y), many, found))
    return Inside(tuple(places), entropy)


def softmax_heads(model) -> Iterator:
    """The softmax below each level: the next level's guiding pixel's, None where it has none, and the RGB head last."""
    for generator in model.generators[1:]:
        yield getattr(generator, "guiding_pixel_loss", None)
    while hasattr(model, "next_fractal"):
        model = model.next_fractal
    yield model


@contextmanager
def inputs_of(heads: dict) -> Iterator[dict]:
    """Inside, what each head is called with: its pixels and conditions."""
    given: dict = {}
    hooks = []
    for level, head in heads.items():
        hooks.append(
            head.register_forward_pre_hook(lambda _, inputs, level=level: given.update({level: inputs[:2]}))
        )
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def entropies(head, pixels: Tensor, conds: Sequence[Tensor]) -> Tensor:
    """Normalised pixels (R, 3) and conditions -> (R, 3) bits, on the host."""
    found = []
    for rows in torch.arange(len(pixels), device=pixels.device).split(ROWS):
        logs = head.logits(to_values(pixels[rows]), [cond[rows] for cond in conds]).log_softmax(-1)
        found.append(-(logs.exp() * logs).sum(-1).cpu() / LN2)
    return torch.cat(found)


def softmax_of(head, pixels: Tensor, conds: Sequence[Tensor], row: int) -> dict:
    levels = to_values(pixels[row : row + 1])
    logs = head.logits(levels, [cond[row : row + 1] for cond in conds])[0].log_softmax(-1)
    return dict(
        entropy=-(logs.exp() * logs).sum(-1).cpu() / LN2, probs=logs.exp().cpu(), levels=levels[0].cpu()
    )


def place_of(
    generator: Generator, steps: Steps | None, num_iter: int, parent: int, pixel, many: bool, found: dict
) -> Place:
    """`parent` is the number of the level's image, which holds `pixel`; `many`: whether neighbours' outputs go down too."""
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
    box = lambda column, row: (left + column * size, top + row * size, size)  # noqa: E731
    around = [(column, row - 1), (column + 1, row), (column, row + 1), (column - 1, row)]
    around = [box(*at) if min(at) >= 0 and max(at) < grid else None for at in around]
    return Place(
        type(generator).__name__, (left, top, spec.img_size), box(column, row), step, len(plan), known,
        tuple(around) if many else (), **found,
    )  # fmt: skip
