"""The random number generators of a process."""

import random

import numpy as np
import torch


def random_state(device: torch.device) -> dict:
    """The states of all random number generators of this process, as tensors and plain values only."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if hasattr(module := torch.get_device_module(device), "get_rng_state"):
        state["device"] = module.get_rng_state(device)
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    """Sets all random number generators of this process to a state that `random_state` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    module = torch.get_device_module(device)
    if "device" in state and hasattr(module, "set_rng_state"):
        module.set_rng_state(state["device"], device)
