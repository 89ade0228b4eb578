import random

import numpy as np
import torch

from util import checkpoint
from util.run import state


def test_random_state_of_every_generator_comes_back(tmp_path):
    device = torch.device("cpu")
    draw = lambda: (random.random(), np.random.random(), torch.rand(1).item())  # noqa: E731
    torch.save({"model": {}, "random": state.random_state(device)}, tmp_path / "state.pth")
    first = draw()
    state.set_random_state(checkpoint.load(tmp_path / "state.pth")["random"], device)
    assert draw() == first
