"""Cuts images of any size into tiles of a model's size (docs/codec.md).

Where a side of the image is no multiple of the tile's, the last tile ends where the image ends. It overlaps
the one before it, and the cells of the overlap, which are known by then, cost nothing. An image that is
smaller than a tile is a part of it; the other cells are 0 and cost nothing either.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from math import prod

import numpy as np


class Tiles:
    """The tiles of images of a shape, in phases: the tiles of a phase do not depend on each other.

    canvas  the sides of the array that the tiles lie in: the image's, or the tile's where they are larger
    phases  for each axis of each phase, where its tiles begin; the first has all tiles that overlap no other
    """

    def __init__(self, shape: Sequence[int], sides: Sequence[int]):
        self.shape, self.sides = tuple(shape), tuple(sides)
        self.canvas = tuple(map(max, shape, sides))
        axes = []
        for whole, side in zip(self.canvas, sides, strict=True):
            regular, last = range(0, whole - side + 1, side), range(whole - side, whole - side + 1)
            axes.append([regular, last] if whole % side else [regular])
        # An overlapping tile comes after all that it overlaps: those are regular along one more axis.
        order = sorted(product(*(range(len(starts)) for starts in axes)), key=sum)
        self.phases = [[starts[kind] for starts, kind in zip(axes, kinds, strict=True)] for kinds in order]

    def count(self, phase: int) -> int:
        """The number of tiles of a phase."""
        return prod(map(len, self.phases[phase]))

    def box(self, phase: int, number: int) -> tuple[slice, ...]:
        """Where a tile of a phase lies in the canvas."""
        places = np.unravel_index(number, tuple(map(len, self.phases[phase])))
        corner = [starts[place] for starts, place in zip(self.phases[phase], places, strict=True)]
        return tuple(slice(first, first + side) for first, side in zip(corner, self.sides, strict=True))

    def known(self, phase: int) -> np.ndarray:
        """(*canvas) bool: the cells that are known before a phase, or lie outside of the image."""
        known = np.ones(self.canvas, bool)
        known[tuple(map(slice, self.shape))] = False
        for starts in self.phases[:phase]:
            known[tuple(slice(a[0], a[-1] + side) for a, side in zip(starts, self.sides, strict=True))] = True
        return known

    def passes(self, indices: Iterable[int], rows: int) -> Iterator[tuple[int, int]]:
        """The passes, of `rows` tiles each, in which images have tiles, in order: (phase, number).

        Tile t of image i is number i * count + t of its phase, whatever other images there are. Pass n has
        the tiles from number n * rows on.
        """
        for phase in range(len(self.phases)):
            count, after = self.count(phase), 0
            for index in sorted(indices):
                end = ((index + 1) * count - 1) // rows + 1
                yield from ((phase, number) for number in range(max(after, index * count // rows), end))
                after = end
