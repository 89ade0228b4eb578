import random

import numpy as np
import torch

from conftest import tiny_model
from util import checkpoint
from util.dist import World
from util.run import state


def test_random_state_of_every_generator_comes_back(tmp_path):
    device = torch.device("cpu")
    draw = lambda: (random.random(), np.random.random(), torch.rand(1).item())  # noqa: E731
    torch.save({"model": {}, "random": state.random_state(device)}, tmp_path / "state.pth")
    first = draw()
    state.set_random_state(checkpoint.load(tmp_path / "state.pth")["random"], device)
    assert draw() == first


def run_state(ema_decay: float) -> state.RunState:
    model = tiny_model("ar")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return state.RunState(model, optimizer, World(), half=False, ema_decay=ema_decay, start_epoch=0, steps=1, images=1, bits={})  # fmt: skip


def test_the_average_begins_with_the_weights_of_the_first_step_and_grows_longer_up_to_its_decay():
    ema, source, expected = run_state(0.75).ema, tiny_model("ar"), None
    for n in range(1, 41):
        weight = torch.full_like(source.fake_latent.data, float(n * n))
        source.fake_latent.data.copy_(weight)
        ema.update(source, step=n)
        decay = min(0.75, (n - 1) / (n + 8))
        expected = weight if expected is None else decay * expected + (1 - decay) * weight
        torch.testing.assert_close(ema.module.fake_latent.data, expected)
