"""Editing: pixels that are known stay, to the bit; the others are drawn, given them. The paper's section 4.4, made exact.

At each level wholly known patches are context from the first step. Partly known ones come next, rather those of which most
is known, and are entered with what is known of them, down to single pixels; then wholly hidden ones, in their usual random
order. Nothing is trained for it. Measured (tests/bench_edit.py, emoji): this order against partly known ones last costs 0.3%
more bits for the true hidden pixels and leaves 4% less of a seam; what matters is that a guiding pixel is drawn given the
known part of its patch (`KnownPixels.guide_weights`): drawn as if nothing were known it costs 1% more bits and 1.9 times the seam.
An AR level sees only the past: pixels known further on, in raster order, are kept but not looked at, neither by it nor by
the levels below it in the patches before. For surroundings that matter on all sides take a MAR model.
Letters: B images, H image side.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.sampling.constraints import Constraint
from models.sampling.generate import labels_of_each
from models.sampling.known import KnownPixels
from util.errors import UserError
from util.inputs import to_mask_batch, to_value_batch
from util.pixels import normalize


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
    """Repaints `image` where `mask` is white, and keeps every other pixel, to the bit.

    image         one or B images of the model's size: PIL, uint8 (B, H, H, 3) arrays, (B, 3, H, H) tensors, or floats 0..1
    mask          one or B masks (B, H, H) of that size, 0 or False: keep; 1, 255 or True: repaint. One serves all images
    class_labels  one for all images, or one each; None: unconditional. Another class than the image's edits the class
    num_results   so many images for each of the B, which come one after the other
    constraint    what all repainted pixels must fulfil: one of models/sampling/constraints.py, or a function like their `__call__`
    options       those of `generate`: settings, seed, callback, output_type …, with the same defaults. num_inference_steps
                  are those of a whole image: where a share of a level's patches is drawn, so is that share of its steps

    A mask that is wholly white gives what `generate` draws with the same seed; an image with nothing to repaint
    comes back at once. Time follows the repainted share. Returns B * num_results images, of `output_type`.

    Raises ValueError for images, masks or settings out of range.
    """
    side, device = model.img_size_list[0], model.fake_latent.device
    levels, hidden = to_value_batch(image, side), to_mask_batch(mask, (side, side))
    images = len(levels) if len(hidden) == 1 else len(hidden)
    if len(levels) not in (1, images):
        raise UserError(f"{len(levels)} images and {len(hidden)} masks; give one of either, or as many")
    labels = labels_of_each(class_labels, model.class_num, images)
    if labels is not None:
        labels = [label for label in labels for _ in range(num_results)]
    levels = _several(levels.to(device).expand(images, -1, -1, -1), num_results)
    hidden = _several(hidden.expand(images, -1, -1), num_results)
    given = KnownPixels(normalize(levels, dtype=model.generator.dtype), hidden, constraint)
    return model.generate(labels, num_images=len(hidden), given=given, **options)


def outpaint(model, image, box: Sequence[int], class_labels=None, **options):
    """`edit` that keeps the box (x, y, width, height), in pixels, and repaints all around it."""
    return edit(model, image, ~box_mask(model.img_size_list[0], box), class_labels, **options)


def edit_class(model, image, box: Sequence[int], class_labels, **options):
    """`edit` that draws another class in the box (x, y, width, height), and keeps its surroundings."""
    return edit(model, image, box_mask(model.img_size_list[0], box), class_labels, **options)


def uncrop(model, image, position: Sequence[int], class_labels=None, **options):
    """Places images smaller than the model's, unscaled, at `position` (x, y) of its canvas, and paints all around them."""
    levels, side = to_value_batch(image), model.img_size_list[0]
    (x, y), (height, width) = position, levels.shape[2:]
    mask = ~box_mask(side, (x, y, width, height))
    canvas = levels.new_zeros(len(levels), 3, side, side)
    canvas[:, :, y : y + height, x : x + width] = levels
    return edit(model, canvas, mask, class_labels, **options)


def edit_tiled(
    model, image, mask, class_labels=None, *, num_results: int = 1, seed: int = 0, **options
) -> np.ndarray:
    """`edit` of one image (1, 3, H, W) of any size from the model's up, in windows of the model's size.

    Windows that overlap by half are repainted one after the other, each given what is known and what those before it have
    drawn; what lies in one window is drawn in one. A window sees nothing beyond itself: a model of small images repaints
    texture, not things. Returns uint8 (num_results, H, W, 3); known pixels to the bit.
    """
    levels, side = to_value_batch(image), model.img_size_list[0]
    height, width = levels.shape[2:]
    masks = to_mask_batch(mask, (height, width))
    if len(levels) != 1 or len(masks) != 1:
        raise UserError(f"{len(levels)} images and {len(masks)} masks; give one of each")
    if min(height, width) < side:
        raise UserError(f"image of {width} x {height} pixels is smaller than the model's {side} x {side}")
    levels, hidden = _several(levels, num_results), masks[0].clone()
    for y in _starts(hidden.any(1), side):
        for x in _starts(hidden.any(0), side):
            here = (..., slice(y, y + side), slice(x, x + side))
            if hidden[here].any():
                indices = [(y * width + x) * num_results + i for i in range(num_results)]
                drawn = edit(
                    model,
                    levels[here],
                    hidden[here],
                    class_labels,
                    seed=seed,
                    output_type="np",
                    indices=indices,
                    **options,
                )
                levels[here] = torch.from_numpy(drawn).permute(0, 3, 1, 2).to(levels.device)
                hidden[here] = False
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def _several(images: Tensor, num_results: int) -> Tensor:
    """Each of (B, …) so many times, one after the other."""
    if num_results < 1:
        raise UserError(f"num_results {num_results} must be at least 1")
    return images.repeat_interleave(num_results, dim=0)


def _starts(lines: Tensor, side: int) -> list[int]:
    """Where windows of `side` begin that hold all True of `lines` (n,) bool: one if they fit, else half overlapping ones."""
    where = lines.nonzero().flatten().tolist()
    if not where:
        return []
    low, high, last = where[0], where[-1] + 1, len(lines) - side
    if high - low <= side:
        return [min(max((low + high - side) // 2, 0), last)]
    starts = range(max(low - side // 4, 0), high - side // 2, max(side // 2, 1))
    return sorted({min(start, last) for start in starts})


def box_mask(size: int | tuple[int, int], box: Sequence[int]) -> Tensor:
    """(H, W) bool, True inside the box (x, y, width, height), in pixels; `size` is (H, W), or the side of a square. UserError
    where the box is not within it."""
    rows, columns = (size, size) if isinstance(size, int) else size
    x, y, width, height = box
    if not (x >= 0 and y >= 0 and width >= 1 and height >= 1 and x + width <= columns and y + height <= rows):
        raise UserError(
            f"box {x} {y} {width} {height} (x, y, width, height) is not within the {columns} x {rows} pixels"
        )
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[y : y + height, x : x + width] = True
    return mask
