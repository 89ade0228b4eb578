"""Loads a model by its folder, its id on the hub, or the name of a published one."""

import logging
from pathlib import Path

import torch

from models import fractalgen
from models.fractalgen import FractalGen
from models.hub.classes import imagenet_names
from util import checkpoint, dist, download
from util.errors import UserError
from util.threads import limit_threads

log = logging.getLogger(__name__)
BUNDLED = Path(__file__).resolve().parents[2] / "demo" / "emoji_model"


def load(name: str | Path = BUNDLED, device: str | torch.device | None = None) -> FractalGen:
    """The model `name`, in eval mode, on `device` (default: the accelerator that torch finds, else the CPU).

    name  a folder that `save_pretrained` wrote; one of download.FILES, whose weights are fetched unless they
          are there, with ImageNet's class names; else an id on the hub

    On a CPU it also limits torch's threads to the free cores (`limit_threads`). Raises UserError where that
    gives no model.
    """
    device = find_device(device)
    if device.type == "cpu":
        log.info(limit_threads())
    if str(name) in download.FILES and not Path(name).is_dir():
        path = download.download(str(name))
        model = fractalgen.build(str(name))
        checkpoint.load_weights(model, checkpoint.load(path, mmap=True)["model"], path)
        model.class_names = imagenet_names()
        return model.eval().to(device)
    return FractalGen.from_pretrained(name, map_location=device)


def load_or_bundled(name: str | Path) -> tuple[FractalGen, str]:
    """As `load`, and returns a sentence that says which model it is.

    Loads the bundled model instead of a published one where there is no accelerator or its weights cannot be
    fetched.
    """
    try:
        if str(name) in download.FILES and find_device().type == "cpu":
            raise UserError(f"{name} wants a GPU")
        return load(name), f"This is {name}."
    except UserError as error:
        if str(name) not in download.FILES:
            raise
        return load(BUNDLED), f"This is the bundled model, since: {error}."


def find_device(device: str | torch.device | None = None) -> torch.device:
    """The device, or the one that torch finds. Raises UserError for one that is not there."""
    return dist.pick_device(None if device is None else str(device), dist.World())
