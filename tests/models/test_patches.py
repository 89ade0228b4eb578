from itertools import product

import pytest
import torch

from models.patches import as_shapes, grid_of, patchify, put, take, unpatchify, with_neighbours

SHAPES = {
    (8,): [(1,), (4,), (8,)],
    (8, 8): [(1, 1), (2, 2), (4, 4), (8, 8)],
    (4, 6): [(2, 3), (4, 1)],
    (4, 2, 6): [(2, 1, 3), (1, 2, 2)],
}


def test_patches_go_row_by_row_and_channel_row_column_inside():
    image = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    patches = patchify(image, (2, 2))
    assert patches.shape == (2, 4, 12)
    for number, (y, x) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        assert torch.equal(patches[:, number], image[:, :, y : y + 2, x : x + 2].flatten(1))


def test_unpatchify_is_the_inverse():
    for shape, sizes in SHAPES.items():
        image = torch.randn(2, 3, *shape)
        for size in sizes:
            assert torch.equal(unpatchify(patchify(image, size), grid_of(shape, size), size), image)


@pytest.mark.parametrize("shape", SHAPES)
def test_patches_are_slices_in_the_order_of_the_axes(shape):
    image = torch.randn(2, 5, *shape)
    for size in SHAPES[shape]:
        corners = product(*(range(0, side, step) for side, step in zip(shape, size, strict=True)))
        slices = [tuple(slice(a, a + b) for a, b in zip(corner, size, strict=True)) for corner in corners]
        expected = torch.stack([image[(..., *part)].flatten(1) for part in slices], dim=1)
        assert torch.equal(patchify(image, size), expected)


def test_neighbours_are_above_right_below_left_and_zero_outside():
    middle = torch.arange(1.0, 10.0).view(1, 9, 1)  # 1 2 3 / 4 5 6 / 7 8 9
    five = torch.cat(with_neighbours(middle, (3, 3)), dim=-1)[0]
    assert five[4].tolist() == [5, 2, 6, 8, 4]
    assert five[0].tolist() == [1, 0, 2, 4, 0]
    assert five[8].tolist() == [9, 6, 0, 0, 8]


def test_neighbours_of_other_grids_are_two_along_each_axis():
    middle = torch.arange(1.0, 13.0).view(1, 12, 1)
    line = torch.cat(with_neighbours(middle, (12,)), dim=-1)[0]
    assert line[[4, 0, 11]].tolist() == [[5, 4, 6], [1, 0, 2], [12, 11, 0]]
    volume = torch.cat(with_neighbours(middle, (2, 2, 3)), dim=-1)[0]  # number = 6 t + 3 y + x + 1
    assert volume[0].tolist() == [1, 0, 4, 2, 7, 0, 0]  # before in t; after in y, x and t; before in y, x
    assert volume[10].tolist() == [11, 5, 0, 12, 0, 8, 10]


def test_an_integer_stands_for_every_axis():
    assert as_shapes([8, 4, 1]) == ((8, 8), (4, 4), (1, 1))
    assert as_shapes([(8,), 4, 1]) == ((8,), (4,), (1,))
    assert as_shapes([(8, 6, 4), (4, 3, 2), 1]) == ((8, 6, 4), (4, 3, 2), (1, 1, 1))
    for wrong in ([(8,), (4, 4), 1], [(2,) * 4, 1], [(), 1], [8.5, 1], [("8",), 1], [None, 1]):
        with pytest.raises(ValueError, match=r"img_size_list .* must have whole numbers for one to 3 axes"):
            as_shapes(wrong)


def test_take_and_put_address_patches_of_each_image():
    x = torch.randn(2, 4, 3)
    where = torch.tensor([[3, 1], [0, 2]])
    taken = take(x, where)
    assert torch.equal(taken, torch.stack([x[0, [3, 1]], x[1, [0, 2]]]))
    assert put(torch.zeros_like(x), where, taken).count_nonzero() == taken.numel()
    assert torch.equal(put(x, where, taken), x)
