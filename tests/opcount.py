"""What a piece of code makes the device do: operations dispatched, and those that wait for it."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "_unique2", "equal")


class OpCount(TorchDispatchMode):
    """Within it, `launched` counts the operations that are no views, and `syncs` those by which a GPU's host would wait."""

    def __init__(self):
        super().__init__()
        self.launched, self.syncs = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not function.is_view:
            self.launched[name] += 1
        boolean_index = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or boolean_index:
            self.syncs[name] += 1
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.launched.values())
