"""Training computes the losses that it computed before: two runs of 50 steps, held against stored curves.

`PYTHONPATH=.:tests python tests/test_loss_curves.py` stores new curves. They may change only with what a step computes: the
architecture of these presets or its initial weights, which random numbers are drawn and in what order, the
loss, the optimiser, its rate or its clipping, the flips, the order of the images. Whoever stores new ones says
in the commit which of these it was. Speed, memory, logging, saving and evaluating must change nothing.

The runs have no dropout: its random numbers are not the same on all processors. Everything else is: a thread,
float32, and a rate at which small differences grow little (AVX2 and AVX-512 differ by 2e-7).
"""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from engine_fractalgen import Recipe, add_weight_decay, train_one_epoch
from models import fractalgen
from util.data.loader import ImageDataset, make_loader
from util.data.source import Source
from util.dist import World
from util.pixels import RGB
from util.run.meters import RunLog
from util.run.watch import LossWatch

CURVES = Path(__file__).parent / "golden" / "curves" / "losses.json"
MODELS = ("fractalar_tiny_in8", "fractalmar_tiny_in8")
RECIPE = Recipe(lr=4e-3, min_lr=0.0, lr_schedule="cosine", warmup_epochs=0.4, epochs=2, grad_clip=0.5)
RELATIVE = 1e-4


class Stripes(Source):
    """100 images of 8 px in four classes: stripes of the class's colour and width, with noise."""

    def __init__(self):
        super().__init__("stripes", np.arange(100) % 4, list("abcd"))
        noise = np.random.Generator(np.random.Philox(0)).integers(0, 40, (100, 3, 8, 8))
        colours = np.array([[200, 20, 20], [20, 200, 20], [20, 20, 200], [200, 200, 20]])[self.labels]
        stripes = np.arange(8) // (1 + self.labels[:, None]) % 2  # (100, 8)
        self.images = (colours[:, :, None, None] * stripes[:, None, None] + noise).astype(np.uint8)

    def cells(self, index, shape, alphabet) -> torch.Tensor:
        return torch.from_numpy(self.images[index])


def losses_of(name: str) -> list[float]:
    """The losses of 50 steps of training the preset."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        np.random.seed(0)
        model = fractalgen.build(name, class_num=4, attn_dropout=0.0, proj_dropout=0.0)
        optimizer = torch.optim.AdamW(add_weight_decay(model, 0.05), lr=1.0, betas=(0.9, 0.95), fused=True)
        data = ImageDataset(Stripes(), (8, 8), RGB, seed=0, flip=True)
        loader = make_loader(data, 4, World(), shuffled=True, num_workers=0, pin_memory=False)
        scaler, watch = torch.amp.GradScaler("cpu", enabled=False), LossWatch()
        for epoch in range(RECIPE.epochs):
            train_one_epoch(
                model, loader, optimizer, scaler, RECIPE, epoch=epoch, device=torch.device("cpu"),
                autocast=nullcontext(), world=World(), log=RunLog(None, enabled=False), watch=watch,
            )  # fmt: skip
        return list(watch.losses)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", MODELS)
def test_the_losses_are_those_that_are_stored(name):
    stored, losses = json.loads(CURVES.read_text())[name], losses_of(name)
    assert len(stored) == len(losses) == 50
    assert stored[-1] < 0.85 * stored[0]  # they learn
    off = np.abs(np.array(losses) / np.array(stored) - 1)
    assert off.max() < RELATIVE, f"off by up to {off.max():.1e}, first in step {np.argmax(off > RELATIVE)}"


if __name__ == "__main__":
    curves = {name: [round(loss, 6) for loss in losses_of(name)] for name in MODELS}
    CURVES.write_text(json.dumps(curves, indent=1) + "\n")
