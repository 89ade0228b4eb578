import re

import numpy as np
import pytest
import torch

from models.noise import Noise

SIZES = (8, 4, 1)


def test_an_image_has_the_same_random_numbers_in_any_batch():
    together = Noise.of_images(5, range(4), SIZES)
    alone = Noise.of_images(5, [2], SIZES)
    for a, b in zip(together.maps, alone.maps, strict=True):
        assert torch.equal(a[2:3], b)


def test_seeds_and_images_differ_and_numbers_are_uniform():
    noise = Noise.of_images(0, range(200), SIZES).maps[-1].double()
    assert noise.min() >= 0
    assert noise.max() < 1
    assert abs(noise.mean() - 0.5) < 0.01
    assert abs(noise.var() - 1 / 12) < 0.005
    assert not torch.equal(Noise.of_images(1, [0], SIZES).maps[-1], Noise.of_images(0, [0], SIZES).maps[-1])
    assert not torch.equal(noise[0], noise[1])


def test_patches_take_the_numbers_that_lie_over_them():
    noise = Noise.of_images(0, range(2), SIZES)
    order = torch.tensor([[3, 0, 1, 2], [1, 2, 3, 0]])  # patch 3 of image 0 is the lower right one
    child = noise.in_order(order).step(0, 2)
    assert len(child.maps) == 2
    assert torch.equal(child.maps[0][0], noise.maps[1][0, :, 1:, 1:])
    assert torch.equal(child.maps[1][0], noise.maps[2][0, :, 4:, 4:])
    assert torch.equal(child.maps[1][2], noise.maps[2][1, :, :4, 4:])
    grandchild = child.in_order(torch.arange(16).expand(4, -1)).step(0, 16)
    assert torch.equal(
        grandchild.value_uniforms.view(4, 4, 4, 3)[0], noise.maps[2][0, 2:, 4:, 4:].permute(1, 2, 0)
    )


def test_each_level_may_have_its_own_seed():
    both, one, other = (Noise.of_images(seed, [3], SIZES) for seed in ([7, 8], 7, 8))
    assert torch.equal(both.order_uniforms, one.order_uniforms)
    assert torch.equal(both.maps[1], one.maps[1])
    assert torch.equal(both.maps[2], other.maps[2])
    same = Noise.of_images([7, 7], [3], SIZES)
    assert all(torch.equal(a, b) for a, b in zip(same.maps, one.maps, strict=True))


@pytest.mark.parametrize("five", [np.int64(5), np.uint8(5), torch.tensor(5)])
def test_seeds_and_indices_may_be_integers_of_numpy_and_torch(five):
    plain, other = Noise.of_images(5, [5], SIZES), Noise.of_images(five, [five], SIZES)
    assert all(torch.equal(a, b) for a, b in zip(plain.maps, other.maps, strict=True))


@pytest.mark.parametrize("odd", [1.5, 1.0, np.float32(1), True, np.bool_(1), torch.tensor(1.5), None])
def test_a_seed_or_index_that_is_no_integer_is_an_error(odd):
    for name, seed, index in (("seed", odd, 0), ("seed", [odd, 2], 0), ("indices", 1, odd)):
        with pytest.raises(ValueError, match=f"^{name} {re.escape(repr(odd))} must be an integer"):
            Noise.of_images(seed, [index], SIZES)


def test_a_seed_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="seed -1"):
        Noise.of_images(-1, [0], SIZES)
    with pytest.raises(ValueError, match=r"seed \[1, 2, 3\] must be one number, or 2"):
        Noise.of_images([1, 2, 3], [0], SIZES)
