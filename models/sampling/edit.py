"""Editing: known pixels stay equal to the bit, and the others are sampled given them (paper, 5.3).

At each level, patches that are wholly known are context from the first step. Partly known patches come next,
the most complete first; their known pixels stay fixed at the levels below, down to single pixels. Wholly
hidden patches come last, in their usual random order. Nothing is trained for this.

Measured with emoji (tests/bench_edit.py; docs/log.md): to put partly known patches last instead saves 0.3% of
the bits of the true hidden pixels and makes the seam 4% stronger. What matters is that a guiding pixel is
sampled given the known pixels of its patch (`KnownPixels.guiding_weights`): without that, these bits are 1%
more and the seam is 1.9 times as strong.

An AR level sees only the past. Known pixels that come later in raster order are kept, but neither this level
nor the levels below it look at them. Where the surroundings on all sides matter, use a MAR model.

Letters: B images, C channels, S an image's sides (one number for each axis).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.patches import Shape, as_shapes
from models.sampling.constraints import Constraint
from models.sampling.generate import generate
from models.sampling.known import KnownPixels
from models.sampling.labels import labels_of_each
from util.errors import ArgumentError, UserError, naming, one_line, warn_once, whole_number
from util.inputs import to_mask_batch, to_value_batch
from util.pixels import in_words, swapped

MAX_SIDE = 2**31  # of boxes and positions; images are smaller
# How people say a place and the sides of a box, by the number of axes. Of two, x comes first, as in Pillow.
PLACES = {1: ("t",), 2: ("x", "y"), 3: ("t", "y", "x")}
SIDES = {1: ("length",), 2: ("width", "height"), 3: ("length", "height", "width")}


def edit(
    model,
    image,
    mask,
    class_labels=None,
    *,
    num_results: int = 1,
    constraint: Constraint | None = None,
    **options,
):
    """Repaints `image` where `mask` is white, and keeps every other pixel equal to the bit (paper, 5.3).

    image         one or B images of the model's shape: PIL, arrays (B, *S, C) or tensors (B, C, *S) of
                  integer values, or of floats 0..1 where values are ordinal
    mask          one or B masks (B, *S): 0 or False keeps a pixel; 1, 255 or True repaints it. One mask
                  serves all images
    class_labels  one for all images, or one for each, a number or a name; None: unconditional. Another class
                  than the image's edits the class
    num_results   number of results for each image, at least 1; the results of an image follow one another
    constraint    what all repainted pixels must fulfil: a Constraint, or a function like
                  `Constraint.__call__`. None: nothing
    options       options of `generate`, with the same defaults. num_inference_steps counts for a whole image:
                  where only a share of a MAR level's patches is sampled, it takes the same share of the steps

    A mask that is wholly white gives what `generate` gives with the same seed. An image with nothing to
    repaint comes back at once, and a line says so if all are such images; otherwise the time grows with the
    repainted share. Returns B * num_results images of `output_type`.

    Raises UserError for images, masks or settings out of range.
    """
    shape, alphabet, device = model.image_shape, model.alphabet, model.fake_latent.device
    values, hidden = to_value_batch(image, shape, alphabet), to_mask_batch(mask, shape)
    num_images = len(values) if len(hidden) == 1 else len(hidden)
    if len(values) not in (1, num_images):
        raise UserError(f"{len(values)} images and {len(hidden)} masks; give one of either, or as many")
    num_results = whole_number("num_results", num_results, 1)
    if constraint is not None and not callable(constraint):
        raise ArgumentError("constraint", f"{one_line(repr(constraint))} must be a Constraint or a function")
    if not hidden.any():
        warn_once("the mask is black everywhere, so that nothing is repainted; what is white would be")
    if isinstance(constraint, Constraint):
        constraint = constraint.of(alphabet)
    labels = labels_of_each(model, class_labels, num_images)
    if labels is not None:
        labels = [label for label in labels for _ in range(num_results)]
    values = values.to(device, non_blocking=True).expand(num_images, *values.shape[1:])
    values = values.repeat_interleave(num_results, dim=0)
    hidden = hidden.expand(num_images, *shape).repeat_interleave(num_results, dim=0)
    known = KnownPixels(alphabet.normalize(values), hidden, alphabet, constraint)
    return generate(model, labels, num_images=len(hidden), known=known, **options)


def outpaint(model, image, box: Sequence[int], class_labels=None, **options):
    """Keeps the box, which `box_mask` describes, and repaints all around it (paper, 5.3).

    The other arguments, the result and the errors are as in `edit`.
    """
    return edit(model, image, ~box_mask(model.image_shape, box), class_labels, **options)


def edit_class(model, image, box: Sequence[int], class_labels, **options):
    """Paints another class in the box, which `box_mask` describes, and keeps the rest (paper, 5.3).

    The other arguments, the result and the errors are as in `edit`.
    """
    return edit(model, image, box_mask(model.image_shape, box), class_labels, **options)


def uncrop(model, image, position: Sequence[int], class_labels=None, **options):
    """Places images on a larger canvas, the model's, and paints all around them (paper, 5.3).

    The images are not scaled; `position` is that of their first cell, named as in PLACES: (x, y), in pixels.
    The other arguments, the result and the errors are as in `edit`.
    """
    axes = len(model.image_shape)
    values = to_value_batch(image, (None,) * axes, model.alphabet)
    corner, sides = integers("position", position, PLACES[axes]), values.shape[2:]
    with naming({"box": "image and position:"}):
        mask = ~box_mask(model.image_shape, [*corner, *swapped(sides)])
    canvas = values.new_zeros(*values.shape[:2], *model.image_shape)
    canvas.masked_scatter_(~mask.to(canvas.device), values)
    return edit(model, canvas, mask, class_labels, **options)


def box_mask(size: int | Shape, box: Sequence[int]) -> Tensor:
    """A mask of cells (*S), bool, True inside the box, as edits need it (paper, 5.3).

    `size` is S, or the side of a square. The box has a place, then sides, named as in PLACES and SIDES:
    (x, y, width, height) in pixels. Raises UserError where the box does not lie within S.
    """
    (shape,) = as_shapes([size])
    names = PLACES[len(shape)] + SIDES[len(shape)]
    numbers = integers("box", box, names)
    places, sides = numbers[: len(shape)], numbers[len(shape) :]
    axes = list(zip(swapped(places), swapped(sides), shape, strict=True))
    if not all(first >= 0 and side >= 1 and first + side <= whole for first, side, whole in axes):
        said = f"{' '.join(map(str, numbers))} ({', '.join(names)})"
        raise ArgumentError("box", f"{said} is not within the {in_words(shape)}")
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[tuple(slice(first, first + side) for first, side, _ in axes)] = True
    return mask


def integers(name: str, numbers, names: Sequence[str]) -> list[int]:
    """The numbers of an argument as ints. Raises ArgumentError unless each of `names` has an integer."""
    numbers = numbers.tolist() if hasattr(numbers, "tolist") else numbers
    if not isinstance(numbers, Sequence) or isinstance(numbers, str) or len(numbers) != len(names):
        said = one_line(repr(numbers))
        raise ArgumentError(name, f"{said} must be {len(names)} integers, {', '.join(names)}")
    return [whole_number(name, number, -MAX_SIDE, MAX_SIDE) for number in numbers]
