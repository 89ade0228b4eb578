"""The random numbers of an image, all drawn before the image is sampled (docs/format.md, "Sampling").

Every node of the fractal tree (the image, each patch of each level, each pixel) owns 2 + C uniform numbers in
[0, 1): one for its place in its parent's random order, one for its number of masked patches, and one for each
channel. The numbers of one depth of the tree lie in a map over the image. The maps are cut into patches
together with the canvas, so that a pixel keeps its numbers whatever else is in the batch.

Letters: N images, C channels, g patches along each axis at this level, L their product, k patches of one
step, R rows (images of the next level).
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from models.patches import Shape, as_shapes, grid_of, patchify
from util.errors import ArgumentError, whole_number

# The indices, among a node's numbers, of the three uses that are named above.
ORDER, COUNT, VALUES = slice(0, 1), slice(1, 2), slice(2, None)
MAX_SEED = 2**63 - 1


class Noise:
    """The uniform random numbers of N images of one level (docs/format.md, "Sampling").

    `maps[d]` is (N, 2 + C, *s_d) float32, where s_0 = 1, … is for the image itself, s_1 = g for its patches,
    and so on, down to its pixels.
    """

    def __init__(self, maps: Sequence[Tensor]):
        self.maps = list(maps)

    @classmethod
    def of_images(
        cls,
        seed: int | Sequence[int],
        indices: Sequence[int],
        sizes: Sequence[int | Shape],
        device=None,
        channels: int = 3,
    ) -> "Noise":
        """Draws the numbers of the images `indices` of `seed`, for levels with image sides `sizes`.

        The generator is counter-based (NumPy's Philox, keyed by seed and index), so image i is the same in
        every batch and process. A list holds one seed for each level above the pixel: for the order of the
        level's patches, and for the values that the softmax below the level samples. Raises ArgumentError for
        a list of another length, and for a seed or index that is no integer from 0 to 2**63 - 1.
        """
        if isinstance(seed, Sequence) and not isinstance(seed, str):
            if len(seed) != len(sizes) - 1:
                raise ArgumentError(
                    "seed",
                    f"{seed} must be one number, or {len(sizes) - 1}, one for each level above the pixel",
                )
            levels = [cls.of_images(one, indices, sizes, device, channels).maps for one in seed]
            return cls([levels[0][0], *(maps[level + 1] for level, maps in enumerate(levels))])
        seed = whole_number("seed", seed, 0, MAX_SEED)
        indices = [whole_number("indices", index, 0, MAX_SEED) for index in indices]
        sizes, numbers = as_shapes(sizes), COUNT.stop + channels
        grids = [grid_of(sizes[0], size) for size in sizes]
        counts = [numbers * prod(grid) for grid in grids]
        flat = np.empty((len(indices), sum(counts)), dtype=np.float32)
        for row, index in zip(flat, indices, strict=True):
            np.random.Generator(np.random.Philox(key=[seed, index])).random(out=row, dtype=np.float32)
        maps = torch.from_numpy(flat).to(device, non_blocking=True).split(counts, dim=1)
        return cls([part.unflatten(1, (numbers, *grid)) for part, grid in zip(maps, grids, strict=True)])

    @property
    def order_uniforms(self) -> Tensor:
        """(N, L): sorting them gives the random order of this level's patches."""
        return self.maps[1][:, ORDER].flatten(1)

    @property
    def mask_uniforms(self) -> Tensor:
        """(N,): they decide how many patches of this level are masked."""
        return self.maps[0][:, COUNT].flatten()

    @property
    def value_uniforms(self) -> Tensor:
        """(N, C): they sample the guiding pixel or, at the bottom of the tree, the pixel, by channel."""
        return self.maps[0][:, VALUES].flatten(1)

    def __len__(self) -> int:
        return len(self.maps[0])

    def part(self, images: slice | Tensor) -> "Noise":
        """Selects some of the images, by a slice or by their numbers (int64)."""
        return Noise([m[images] for m in self.maps])

    def in_order(self, order: Tensor) -> "PatchNoise":
        """Sorts the random numbers of the patches as in `order` (N, L), which holds patch numbers."""
        at = torch.arange(len(order), device=order.device)[:, None]
        return PatchNoise([m[at, order] for m in self._patches()])

    def rows(self, rows: Tensor) -> "Noise":
        """Selects the patches `rows` (R,) as R images of the next level.

        Patch j of image n has number n * L + j.
        """
        return Noise([m.flatten(0, 1)[rows] for m in self._patches()])

    def _patches(self) -> list[Tensor]:
        """Cuts the maps below this level into patches: (N, L, 2 + C, *s), s a patch's sides in the map."""
        _, numbers, *grid = self.maps[1].shape
        sides = [grid_of(m.shape[2:], grid) for m in self.maps[1:]]
        return [
            patchify(m, side).unflatten(2, (numbers, *side))
            for m, side in zip(self.maps[1:], sides, strict=True)
        ]


class PatchNoise:
    """The random numbers of N images' patches, in the order in which they are sampled (paper, 3.2).

    `maps[d]` is (N, L, 2 + C, *s_d), with s_0 = 1, … for the patch itself.
    """

    def __init__(self, maps: Sequence[Tensor]):
        self.maps = maps

    def step(self, begin: int, end: int) -> Noise:
        """Selects the patches at places [begin, end): N * (end - begin) images of the next level."""
        return Noise([m[:, begin:end].flatten(0, 1) for m in self.maps])
