"""Begins the training of a model with the weights of another (fine-tuning)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.fractalgen import FractalGen
from models.generator import Generator
from models.hub.source import Source
from models.patches import Shape, as_shapes, grid_of
from util import checkpoint
from util.errors import UserError

CLASSES, POSITIONS = "class_emb.weight", "generator.pos_embed_learned"
INTERPOLATION = {1: "linear", 2: "bicubic", 3: "trilinear"}  # by the number of axes
LEAST = 0.5  # share of the numbers of a model that must be taken


@torch.no_grad()
def begin(model: FractalGen, source: Source, class_names: Sequence[str] | None) -> list[str]:
    """Copies what fits of the weights of `source` into `model`. Returns lines that say what was done.

    Embeddings of classes are taken by name where both models have names, and otherwise by number where there
    are as many classes. An embedding that is begun anew is `fake_latent`, the condition of no class,
    plus the small random numbers of a new one. Learned positions of level 0 are interpolated for another
    number of patches. What has another shape, or is missing, is begun anew.

    Raises UserError where that leaves less than half of the numbers of the model.
    """
    weights, own, lines = source.weights(), model.state_dict(), []
    merged, anew = {}, []
    for name, target in own.items():
        given = weights.get(name)
        if name == POSITIONS and given is not None and given.shape != target.shape:
            sizes = (source.config or {}).get("img_size_list")
            before = grid_of(*as_shapes(sizes)[:2]) if sizes else None
            resized = resize_positions(given, before, model.generator)
            if resized is not None and resized.shape == target.shape:
                lines.append(f"resized: positions of level 0, {given.shape[1]} to {target.shape[1]}")
                given = resized
        if name == CLASSES and given is not None and given.shape[1:] == target.shape[1:]:
            theirs = (source.config or {}).get("class_names")
            latent = weights.get("fake_latent", target[:0])
            latent = latent if latent.shape == own["fake_latent"].shape else own["fake_latent"]
            given, line = _take_classes(target, latent, given, theirs, class_names)
            lines.append(line)
        if given is not None and given.shape == target.shape:
            merged[name] = given
        else:
            anew.append(name)
    taken, total = (sum(value.numel() for value in group.values()) for group in (merged, own))
    if taken < LEAST * total:
        raise UserError(
            f"--finetune {source.path}: only {taken:,} of {total:,} numbers fit this model; give the --model "
            "that they are of"
        )
    checkpoint.load_weights(model, {**own, **merged}, source.path)
    unused = [name for name in weights if name not in own]
    for what, names in (("begun anew", anew), ("not used", unused)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{what}: {', '.join(names[:3])}{more}")
    return [f"weights of {source.path}: {len(merged)} of {len(own)} taken", *lines]


def resize_positions(given: Tensor, before: Shape | None, generator: Generator) -> Tensor | None:
    """Interpolates learned positions (1, T, D) to the grid of patches of `generator` (cubic for two axes).

    `before` is the grid that they are of; None: a square, or one axis, like the generator's. A MAR level has
    the positions of its prefix tokens before those of the patches; an AR level has one more after them, which
    nothing uses. These are kept. Returns None where T does not fit the grid.
    """
    grid, first = generator.spec.grid, getattr(generator, "num_prefix", 0)
    others = generator.pos_embed_learned.shape[1] - generator.spec.num_patches
    length = given.shape[1] - others
    before = (round(max(0, length) ** (1 / len(grid))),) * len(grid) if before is None else before
    if math.prod(before) != length or len(before) != len(grid):
        return None
    patches = given[:, first : first + length].unflatten(1, before).movedim(-1, 1).float()
    resized = F.interpolate(patches, grid, mode=INTERPOLATION[len(grid)]).flatten(2).transpose(1, 2)
    return torch.cat([given[:, :first], resized.to(given.dtype), given[:, first + length :]], dim=1)


def _take_classes(
    own: Tensor, fake_latent: Tensor, given: Tensor, theirs: Sequence[str] | None, ours: Sequence[str] | None
) -> tuple[Tensor, str]:
    """The embeddings of our classes: those `given` or `own` ones, and a line that says how many of each.

    One that is begun anew is `fake_latent` plus our own, which is random and small.
    """
    if theirs and ours:
        found, how = {label: theirs.index(name) for label, name in enumerate(ours) if name in theirs}, "name"
    else:
        found, how = {label: label for label in range(len(own)) if len(given) == len(own)}, "number"
    classes = [given[found[i]] if i in found else own[i] + fake_latent[0] for i in range(len(own))]
    anew = len(own) - len(found)
    line = f"classes: {len(found)} of {len(given)} taken by {how}"
    return torch.stack(classes) if classes else own, line + (f", {anew} begun anew" if anew else "")
