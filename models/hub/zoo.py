"""Loads a model by its folder, its id on the hub, or the name of a published one."""

import logging
from pathlib import Path

import torch

from models.fractalgen import FractalGen
from models.hub.source import is_hub_id
from util import dist, download
from util.errors import UserError, perhaps
from util.threads import limit_threads

log = logging.getLogger(__name__)
BUNDLED = Path(__file__).resolve().parents[2] / "demo" / "emoji_model"


def load(name: str | Path = BUNDLED, device: str | torch.device | None = None) -> FractalGen:
    """The model `name`, in eval mode, on `device` (default: the accelerator that torch finds, else the CPU).

    name  a folder that `save_pretrained` or training wrote, or a checkpoint of a run; one of download.FILES,
          whose weights are fetched unless they are there, with ImageNet's class names and `about`; else an id
          on the hub, OWNER/NAME

    On a CPU it also limits torch's threads to the free cores (`limit_threads`). Raises UserError where that
    gives no model, without a network for what is no id, and with the published names that come close.
    """
    device = find_device(device)
    if device.type == "cpu":
        log.info(limit_threads())
    if str(name) not in download.FILES and not Path(name).exists() and not is_hub_id(str(name)):
        raise UserError(f"{name}: no such folder or published model{perhaps(str(name), download.FILES)}")
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
