import torch

from models.patches import patchify, put, take, unpatchify, with_neighbours


def test_patches_go_row_by_row_and_channel_row_column_inside():
    image = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    patches = patchify(image, 2)
    assert patches.shape == (2, 4, 12)
    for number, (y, x) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        assert torch.equal(patches[:, number], image[:, :, y : y + 2, x : x + 2].flatten(1))


def test_unpatchify_is_the_inverse():
    image = torch.randn(2, 3, 8, 8)
    for size in (1, 2, 4, 8):
        assert torch.equal(unpatchify(patchify(image, size), size), image)


def test_neighbours_are_above_right_below_left_and_zero_outside():
    middle = torch.arange(1.0, 10.0).view(1, 9, 1)  # 1 2 3 / 4 5 6 / 7 8 9
    five = torch.cat(with_neighbours(middle), dim=-1)[0]
    assert five[4].tolist() == [5, 2, 6, 8, 4]
    assert five[0].tolist() == [1, 0, 2, 4, 0]
    assert five[8].tolist() == [9, 6, 0, 0, 8]


def test_take_and_put_address_patches_of_each_image():
    x = torch.randn(2, 4, 3)
    where = torch.tensor([[3, 1], [0, 2]])
    taken = take(x, where)
    assert torch.equal(taken, torch.stack([x[0, [3, 1]], x[1, [0, 2]]]))
    assert put(torch.zeros_like(x), where, taken).count_nonzero() == taken.numel()
    assert torch.equal(put(x, where, taken), x)
