"""An image's randomness, all of it, drawn before the image is.

Every node of the fractal tree (the image, each patch of each level, each pixel) owns five uniform numbers in [0, 1):
its place in its parent's random order, its number of masked patches, and one for each of R, G, B.
The numbers of one depth lie in a map over the image, and the maps are cut into patches along with the canvas,
so a number reaches the pixel that it belongs to whatever else is in the batch.

Letters: N images, g patches a side at this level, L = g * g, k patches taken.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.patches import patchify

ORDER, COUNT, COLOUR = slice(0, 1), slice(1, 2), slice(2, 5)
NUMBERS = 5


class Noise:
    """The uniforms of N images at one level: `maps[d]` is (N, 5, s_d, s_d) float32 with s_0 = 1, s_1 = g, …, pixels."""

    def __init__(self, maps: Sequence[Tensor]):
        self.maps = list(maps)

    @classmethod
    def of_images(
        cls, seed: int | Sequence[int], indices: Sequence[int], sizes: Sequence[int], device=None
    ) -> "Noise":
        """Noise of images number `indices` of `seed`, for a model with image sizes `sizes`.

        Counter-based (NumPy's Philox, keyed by seed and index): image i is the same in every batch and process. A list
        holds a seed for each level above the pixel: of its order of patches and of what the softmax below it draws.
        """
        if isinstance(seed, Sequence):
            if len(seed) != len(sizes) - 1:
                raise ValueError(
                    f"seed {seed} must be one number, or {len(sizes) - 1}, one for each level above the pixel"
                )
            levels = [cls.of_images(one, indices, sizes, device).maps for one in seed]
            return cls([levels[0][0], *(maps[level + 1] for level, maps in enumerate(levels))])
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed} is out of range; it must be from 0 to 2**63 - 1")
        sides = [sizes[0] // size for size in sizes]
        per_image = sum(NUMBERS * side * side for side in sides)
        flat = np.empty((len(indices), per_image), dtype=np.float32)
        for row, index in zip(flat, indices, strict=True):
            np.random.Generator(np.random.Philox(key=[seed, int(index)])).random(out=row, dtype=np.float32)
        split = (
            torch.from_numpy(flat)
            .to(device, non_blocking=True)
            .split([NUMBERS * s * s for s in sides], dim=1)
        )
        return cls([part.unflatten(1, (NUMBERS, s, s)) for part, s in zip(split, sides, strict=True)])

    @property
    def order(self) -> Tensor:
        """(N, L): the patches' places in this level's order."""
        return self.maps[1][:, ORDER].flatten(1)

    @property
    def count(self) -> Tensor:
        """(N,): decides how many patches are masked."""
        return self.maps[0][:, COUNT].flatten()

    @property
    def colour(self) -> Tensor:
        """(N, 3): draws R, G, B of the guiding pixel, or of the pixel itself at the bottom."""
        return self.maps[0][:, COLOUR].flatten(1)

    def __len__(self) -> int:
        return len(self.maps[0])

    def part(self, images: slice | Tensor) -> "Noise":
        return Noise([m[images] for m in self.maps])

    def in_order(self, order: Tensor) -> "PatchNoise":
        """Noise of the patches, sorted as in `order` (N, L)."""
        at = torch.arange(len(order), device=order.device)[:, None]
        return PatchNoise([m[at, order] for m in self._patches()])

    def rows(self, rows: Tensor) -> "Noise":
        """Noise of the patches number `rows` (R,), counted through all images: R images of the next level."""
        return Noise([m.flatten(0, 1)[rows] for m in self._patches()])

    def _patches(self) -> list[Tensor]:
        """The maps below this level, cut into patches (N, L, 5, s, s)."""
        grid = self.maps[1].shape[-1]
        sides = [m.shape[-1] // grid for m in self.maps[1:]]
        return [
            patchify(m, s).unflatten(2, (NUMBERS, s, s)) for m, s in zip(self.maps[1:], sides, strict=True)
        ]


class PatchNoise:
    """The uniforms of N images' patches, in the order in which they are decided: `maps[d]` is (N, L, 5, s_d, s_d)."""

    def __init__(self, maps: Sequence[Tensor]):
        self.maps = maps

    def step(self, begin: int, end: int) -> Noise:
        """Noise of the patches at places [begin, end): N * (end - begin) images of the next level."""
        return Noise([m[:, begin:end].flatten(0, 1) for m in self.maps])
