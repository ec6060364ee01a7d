"""The memory of all tensors that are alive, counted on a CPU as a GPU's allocator would."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, at every operation."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.peak = 0

    def add(self, tensor: torch.Tensor) -> None:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        known = self.storages.get(storage._cdata)
        if known is None or known() is None:
            self.storages[storage._cdata] = weakref.ref(storage)

    def bytes(self) -> int:
        alive = {key: found for key, ref in self.storages.items() if (found := ref()) is not None}
        self.storages = {key: self.storages[key] for key in alive}
        return sum(storage.nbytes() for storage in alive.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_flatten((args, kwargs, result))[0]:
            if isinstance(value, torch.Tensor):
                self.add(value)
        self.peak = max(self.peak, self.bytes())
        return result
