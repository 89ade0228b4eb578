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

Letters: B images, H image side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.sampling.constraints import Constraint
from models.sampling.generate import generate
from models.sampling.known import KnownPixels
from models.sampling.labels import labels_of_each
from util.errors import ArgumentError, UserError, naming, one_line, warn_once, whole_number
from util.inputs import to_mask_batch, to_value_batch
from util.pixels import normalize

MAX_SIDE = 2**31  # of boxes and positions; images are smaller


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

    image         one or B images of the model's size: PIL, uint8 (B, H, H, 3) arrays, (B, 3, H, H) tensors,
                  or floats 0..1
    mask          one or B masks (B, H, H): 0 or False keeps a pixel; 1, 255 or True repaints it. One mask
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
    side, device = model.img_size_list[0], model.fake_latent.device
    values, hidden = to_value_batch(image, side), to_mask_batch(mask, (side, side))
    num_images = len(values) if len(hidden) == 1 else len(hidden)
    if len(values) not in (1, num_images):
        raise UserError(f"{len(values)} images and {len(hidden)} masks; give one of either, or as many")
    num_results = whole_number("num_results", num_results, 1)
    if constraint is not None and not callable(constraint):
        raise ArgumentError("constraint", f"{one_line(repr(constraint))} must be a Constraint or a function")
    if not hidden.any():
        warn_once("the mask is black everywhere, so that nothing is repainted; what is white would be")
    labels = labels_of_each(model, class_labels, num_images)
    if labels is not None:
        labels = [label for label in labels for _ in range(num_results)]
    values = values.to(device, non_blocking=True).expand(num_images, -1, -1, -1)
    values = values.repeat_interleave(num_results, dim=0)
    hidden = hidden.expand(num_images, -1, -1).repeat_interleave(num_results, dim=0)
    known = KnownPixels(normalize(values, dtype=model.generator.dtype), hidden, constraint)
    return generate(model, labels, num_images=len(hidden), known=known, **options)


def outpaint(model, image, box: Sequence[int], class_labels=None, **options):
    """Keeps the box (x, y, width, height), in pixels, and repaints all around it (paper, 5.3).

    The other arguments, the result and the errors are as in `edit`.
    """
    return edit(model, image, ~box_mask(model.img_size_list[0], box), class_labels, **options)


def edit_class(model, image, box: Sequence[int], class_labels, **options):
    """Paints another class in the box (x, y, width, height) and keeps what surrounds it (paper, 5.3).

    The other arguments, the result and the errors are as in `edit`.
    """
    return edit(model, image, box_mask(model.img_size_list[0], box), class_labels, **options)


def uncrop(model, image, position: Sequence[int], class_labels=None, **options):
    """Places images on a larger canvas, the model's, and paints all around them (paper, 5.3).

    The images are not scaled; `position` (x, y) is that of their top left corner, in pixels. The other
    arguments, the result and the errors are as in `edit`.
    """
    values, side = to_value_batch(image), model.img_size_list[0]
    (x, y), (height, width) = integers("position", position, "x, y"), values.shape[2:]
    with naming({"box": "image and position:"}):
        mask = ~box_mask(side, (x, y, width, height))
    canvas = values.new_zeros(len(values), 3, side, side)
    canvas[:, :, y : y + height, x : x + width] = values
    return edit(model, canvas, mask, class_labels, **options)


def box_mask(size: int | tuple[int, int], box: Sequence[int]) -> Tensor:
    """(H, W) bool, True inside the box (x, y, width, height) in pixels, as edits need it (paper, 5.3).

    `size` is (H, W), or the side of a square. Raises UserError where the box does not lie within it.
    """
    rows, columns = (size, size) if isinstance(size, int) else size
    x, y, width, height = integers("box", box, "x, y, width, height")
    if not (x >= 0 and y >= 0 and width >= 1 and height >= 1 and x + width <= columns and y + height <= rows):
        raise ArgumentError(
            "box",
            f"{x} {y} {width} {height} (x, y, width, height) is not within the {columns} x {rows} pixels",
        )
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[y : y + height, x : x + width] = True
    return mask


def integers(name: str, numbers, names: str) -> list[int]:
    """The numbers of an argument as ints. Raises ArgumentError unless each of `names` has an integer."""
    numbers = numbers.tolist() if hasattr(numbers, "tolist") else numbers
    count = len(names.split(", "))
    if not isinstance(numbers, Sequence) or isinstance(numbers, str) or len(numbers) != count:
        raise ArgumentError(name, f"{one_line(repr(numbers))} must be {count} integers, {names}")
    return [whole_number(name, number, -MAX_SIDE, MAX_SIDE) for number in numbers]
