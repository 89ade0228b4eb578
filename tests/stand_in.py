"""A stand-in for a GPU on a machine without one: a device that computes real values and refuses to be waited for.

Its tensors have `STAND_IN` as their device, so that code takes the ways of an accelerator, and hold their values
in a tensor on the CPU. As on a GPU, mixing them with tensors of the host is an error. Within `no_waiting`, so is
each operation for which the host would wait: reading a value, copying to the host, a copy from the host that
is not `non_blocking`, and a result whose size depends on values. Lines that end with `# sync` may wait.
"""

import linecache
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

STAND_IN = torch.device("lazy")  # a device type that every torch knows and that needs no driver
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "_unique2", "equal")
READING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__")


class Waited(RuntimeError):
    """The host waited for the device in a line that is not marked `# sync`."""


class DeviceTensor(torch.Tensor):
    """A tensor of the stand-in; `values` are on the CPU."""

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        layout = dict(strides=values.stride(), storage_offset=values.storage_offset())
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=values.dtype, device=STAND_IN, requires_grad=False, **layout
        )
        made.values = values
        return made

    def __repr__(self, **_):
        return f"DeviceTensor({self.values})"

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return StandIn.current.run(function, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


class StandIn(TorchDispatchMode):
    """A context in which tensors can be made on, and moved to, the device STAND_IN."""

    current: "StandIn"

    def __init__(self):
        super().__init__()
        self.waiting_allowed, StandIn.current = True, self

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.run(function, args, kwargs or {})

    def run(self, function, args, kwargs):
        name, there = function.overloadpacket.__name__, kwargs.get("device")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = [x for x in tensors if isinstance(x, DeviceTensor)]
        to_device = bool(on_device) if there is None else torch.device(there) == STAND_IN
        if not (on_device or to_device):
            return function(*args, **kwargs)
        if (name == "_to_copy" and to_device != bool(on_device)) or 0 < len(on_device) < len(tensors):
            self.check_copy(
                function, name, tensors, on_device, kwargs.get("non_blocking") or args[-1] is True
            )
        if on_device and (name in WAITING or self.has_boolean_index(name, args)):
            self.wait(name)
        if there is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if name == "_conj":  # a mark that the values would bear, but not the tensor that holds them
            function = torch.ops.aten.conj_physical.default
        args_on_cpu, kwargs_on_cpu = tree_map_only(DeviceTensor, lambda x: x.values, (args, kwargs))
        result = function(*args_on_cpu, **kwargs_on_cpu)
        if function._schema.is_mutable and isinstance(result, torch.Tensor):  # in place, or into `out`
            return kwargs.get("out", args[0])
        if not to_device:
            return result
        return (
            DeviceTensor(result)
            if isinstance(result, torch.Tensor)
            else tree_map_only(torch.Tensor, DeviceTensor, result)
        )

    def check_copy(self, function, name, tensors, on_device, non_blocking):
        if name in ("_to_copy", "copy_"):
            if not non_blocking or (name == "_to_copy" and on_device):
                self.wait(f"{name} between host and device")
        elif any(x.dim() > 0 for x in tensors if not isinstance(x, DeviceTensor)):
            raise RuntimeError(f"{function}: tensors of the host and of the device")

    @staticmethod
    def has_boolean_index(name, args) -> bool:
        indexes = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        return indexes and any(x is not None and x.dtype == torch.bool for x in args[1])

    def wait(self, what: str) -> None:
        if not self.waiting_allowed:
            raise Waited(what)


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Makes the host's waiting for `device`, a GPU or the stand-in, an error, except in lines marked `# sync`."""
    kind = DeviceTensor if device == STAND_IN else torch.Tensor
    with ExitStack() as stack:
        for name in READING:
            allowed = _allowed_if_marked(getattr(kind, name), device)
            stack.enter_context(patch.object(kind, name, allowed))
        stack.enter_context(_waiting(device, allowed=False))
        yield


def _allowed_if_marked(method: Callable, device: torch.device) -> Callable:
    def call(*args, **kwargs):
        caller = sys._getframe(1)
        if "# sync" not in linecache.getline(caller.f_code.co_filename, caller.f_lineno):
            return method(*args, **kwargs)
        with _waiting(device, allowed=True):
            return method(*args, **kwargs)

    return call


@contextmanager
def _waiting(device: torch.device, allowed: bool) -> Iterator[None]:
    if device == STAND_IN:
        with patch.object(StandIn.current, "waiting_allowed", allowed):
            yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("default" if allowed else "error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
