"""Presets that are adapted to other data."""

import pytest
import torch

from models import fractalgen
from models.fractalgen import PRESETS
from models.hub.presets import find_preset
from util.pixels import Alphabet

MAR, AR, GUIDED = "fractalmar_tiny_in8", "fractalar_tiny_in8", "fractalmar_tiny_guided_in32"


def test_a_preset_alone_is_what_it_is():
    assert find_preset(MAR, channels=3, num_values=256, img_size_list=[8, 4, 1]) is PRESETS[MAR]
    with pytest.raises(ValueError, match="num_conds 3 contradicts model"):
        find_preset(MAR, num_conds=3, channels=3)


def test_other_data_change_sizes_and_alphabet_and_what_these_decide():
    line = find_preset(MAR, img_size_list=[(12,), 2, 1], channels=2, num_values=5)
    assert (line.num_conds, line.steps) == (3, (4, 2))
    assert find_preset(MAR, img_size_list=[(12,), 2, 1], num_conds=2).num_conds == 2
    assert find_preset(MAR, img_size_list=[(8, 4, 4), 2, 1]).num_conds == 5
    assert find_preset(GUIDED, channels=1).guiding_pixel
    assert not find_preset(GUIDED, value_kind="categorical").guiding_pixel
    with torch.device("meta"):
        model = fractalgen.build(MAR, class_num=2, img_size_list=[(12,), 2, 1], channels=2, num_values=5)
    assert (model.image_shape, model.num_dims, model.num_conds) == ((12,), 24, 3)
    assert model.alphabet == Alphabet(2, 5)
    assert model.sampling_defaults.num_inference_steps == (4, 2)


def test_the_number_of_levels_is_the_presets():
    with pytest.raises(ValueError, match=r"img_size_list \[16, 8, 4, 1\] must have 3 entries for model"):
        find_preset(MAR, img_size_list=[16, 8, 4, 1])
