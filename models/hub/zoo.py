"""Loads a model by the name of a bundled or published one, its folder, or its id on the hub."""

import logging
from pathlib import Path

import torch

from models.fractalgen import FractalGen
from models.hub.source import is_hub_id
from util import checkpoint, dist, download
from util.errors import UserError, perhaps
from util.threads import limit_threads

log = logging.getLogger(__name__)
DEMO = Path(__file__).resolve().parents[2] / "demo"
# the models that come with this repository
BUNDLED = {name: DEMO / f"{name}_model" for name in ("emoji", "fashion_ar", "fashion_mar")}
DEFAULT = "emoji"


def names() -> list[str]:
    """The bundled models whose folders are there, the default first."""
    found = [name for name, folder in BUNDLED.items() if (folder / checkpoint.SAFETENSORS_NAME).is_file()]
    return sorted(found, key=DEFAULT.__ne__)


def load(name: str | Path = DEFAULT, device: str | torch.device | None = None) -> FractalGen:
    """The model `name`, in eval mode, on `device` (default: the accelerator that torch finds, else the CPU).

    name  a bundled model, one of `names()`, also where there is a folder of that name; else a folder that
          `save_pretrained` or training wrote, or a checkpoint of a run; one of download.FILES, whose weights
          are fetched unless they are there, with ImageNet's class names and `about`; or an id on the hub,
          OWNER/NAME

    On a CPU it also limits torch's threads to the free cores (`limit_threads`). Raises UserError where that
    gives no model, without a network for what is no id, with the names that come close and the bundled ones.
    """
    device = find_device(device)
    if device.type == "cpu":
        log.info(limit_threads())
    where = str(name)
    here = f"; bundled here: {', '.join(names()) or 'none'}"
    if where in BUNDLED and where not in names():
        raise UserError(f"{where}: the folder {BUNDLED[where]} of this bundled model is missing{here}")
    if not (where in BUNDLED or where in download.FILES or Path(name).exists() or is_hub_id(where)):
        close = perhaps(where, [*names(), *download.FILES])
        raise UserError(f"{where}: no such folder or published model{close}{here}")
    return FractalGen.from_pretrained(BUNDLED.get(where, name), map_location=device)


def load_or_bundled(name: str | Path) -> tuple[FractalGen, str]:
    """As `load`, and returns a sentence that says which model it is.

    Loads the default model instead of a published one where there is no accelerator or its weights cannot be
    fetched.
    """
    try:
        if str(name) in download.FILES and find_device().type == "cpu":
            raise UserError(f"{name} wants a GPU")
        return load(name), f"This is {name}."
    except UserError as error:
        if str(name) not in download.FILES:
            raise
        return load(DEFAULT), f"This is the bundled model {DEFAULT}, since: {error}."


def find_device(device: str | torch.device | None = None) -> torch.device:
    """The device, or the one that torch finds. Raises UserError for one that is not there."""
    return dist.pick_device(None if device is None else str(device), dist.World())
