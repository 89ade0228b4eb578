"""Counts the operations that code dispatches, and those that make the host wait for a GPU."""

from collections import Counter
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "_unique2", "equal")


class OpCount(TorchDispatchMode):
    """A context that counts operations: `launched` all but views, `syncs` those that make the host wait."""

    def __init__(self):
        super().__init__()
        self.launched, self.syncs = Counter(), Counter()

    def __enter__(self):
        self.patches = ExitStack()
        for name in ("tolist", "cpu", "numpy"):  # on a CPU these dispatch no operation
            self.patches.enter_context(patch.object(torch.Tensor, name, self._counted(name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        return super().__exit__(*error)

    def _counted(self, name: str):
        method = getattr(torch.Tensor, name)

        def counted(tensor, *args, **kwargs):
            self.syncs[name] += 1
            return method(tensor, *args, **kwargs)

        return counted

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
