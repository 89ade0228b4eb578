"""A small convolutional network that reads the class of an image of Fashion-MNIST, to judge samples by.

It is trained on the 60,000 real training images, in about two minutes on one core, and reads at least 91% of
the 10,000 test images right.
"""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
from pathlib import Path

import numpy as np
import torch
from fashion_data import read_fashion
from torch import nn
from torch.nn import functional as F

from util.files import atomic_write

EPOCHS, BATCH, RATE = 4, 128, 4e-3


def make_network() -> nn.Sequential:
    """Values (n, 1, 28, 28) of about -1..1 -> logits (n, 10)."""
    layers = []
    for inputs, outputs, pool in ((1, 16, 2), (16, 32, 2), (32, 64, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU(), nn.MaxPool2d(pool)]
    layers += [nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # 1.4 times as fast on a CPU


class Classifier:
    """Maps uint8 images (n, 28, 28) to their classes (n,)."""

    def __init__(self):
        self.network = make_network().eval()

    @classmethod
    def trained(cls, data: Path, file: Path) -> "Classifier":
        """The classifier of `file`; without that file it is trained on the IDX files of `data`, and saved."""
        classifier = cls()
        if not file.exists():
            classifier.train(*read_fashion(data, "train"))
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as temporary:
                torch.save(classifier.network.state_dict(), temporary)
        classifier.network.load_state_dict(torch.load(file, weights_only=True))
        return classifier

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(np.array(images)).split(500)
        return torch.cat([self.logits(part).argmax(1) for part in parts]).numpy()

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (n, 10) of uint8 images (n, 28, 28)."""
        return self.network((images[..., None].float() / 128 - 1).permute(0, 3, 1, 2))  # channels last

    def train(self, images: np.ndarray, labels: np.ndarray, seed: int = 0) -> None:
        """Trains on the images and, as often, on their mirror images."""
        images, labels = torch.from_numpy(images), torch.from_numpy(labels).long()
        steps = len(images) // BATCH
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = make_network().train()
            optimizer = torch.optim.AdamW(self.network.parameters(), lr=RATE, weight_decay=0.05)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * steps)
            for _ in range(EPOCHS):
                for chosen in torch.randperm(len(images)).split(BATCH)[:steps]:
                    batch = images[chosen]
                    batch = torch.where(torch.rand(len(batch), 1, 1) < 0.5, batch.flip(2), batch)
                    loss = F.cross_entropy(self.logits(batch), labels[chosen], label_smoothing=0.05)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
        self.network.eval()
