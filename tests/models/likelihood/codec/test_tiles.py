"""Images of any size as tiles of a model's."""

import numpy as np
import pytest

from models.likelihood.codec.tiles import Tiles

CASES = [
    ((8, 8), (8, 8)), ((16, 24), (8, 8)), ((9, 17), (8, 8)), ((3, 20), (8, 4)), ((5,), (4,)), ((4, 5, 7), (2, 4, 3)),
    ((1, 1), (6, 4)),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "sides"), CASES)
def test_each_cell_is_coded_once_and_after_those_that_count_as_known(shape, sides):
    tiles = Tiles(shape, sides)
    coded = np.zeros(tiles.canvas, int)
    for phase in range(len(tiles.phases)):
        known = tiles.known(phase)
        inside = np.zeros_like(known)
        inside[tuple(map(slice, shape))] = True
        assert (known == ((coded == 1) | ~inside)).all()
        for number in range(tiles.count(phase)):
            box = tiles.box(phase, number)
            assert known[box].shape == tuple(sides)
            assert not known[box].all()
            coded[box] += ~known[box]
    assert (coded == inside).all()


@pytest.mark.parametrize("rows", [1, 3, 4, 100])
@pytest.mark.parametrize(("shape", "sides"), CASES)
def test_images_pass_where_their_tiles_are_whatever_other_images_there_are(shape, sides, rows):
    tiles = Tiles(shape, sides)
    for indices in ([0], [6, 0, 3], range(7)):
        expected = []
        for phase in range(len(tiles.phases)):
            count = tiles.count(phase)
            numbers = {(index * count + tile) // rows for index in indices for tile in range(count)}
            expected += [(phase, number) for number in sorted(numbers)]
        assert list(tiles.passes(indices, rows)) == expected


def test_a_huge_image_takes_no_memory_before_its_tiles_are_asked_for():
    tiles = Tiles((2**13, 2**13), (2, 2))
    assert tiles.count(0) == 2**24
    assert next(tiles.passes([10**6], 5)) == (0, 10**6 * 2**24 // 5)
