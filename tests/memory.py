"""How many bytes tensors hold, for tests of what is done in parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runner import shares


class Bytes(TorchDispatchMode):
    """The most bytes that were held at one moment in tensors that came into being inside of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._sizes: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        for storage in self._storages((given, named)):
            if storage._cdata not in self._live():
                self._before[storage._cdata] = StorageWeakRef(storage)
        found = function(*given, **(named or {}))
        self._before = {key: ref for key, ref in self._before.items() if not ref.expired()}
        for storage in self._storages(found):
            if storage._cdata not in self._before:
                self._sizes[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, sum(self._live().values()))
        return found

    def _live(self) -> dict[int, int]:
        self._sizes = {key: held for key, held in self._sizes.items() if not held[0].expired()}
        return {key: size for key, (_, size) in self._sizes.items()}

    @staticmethod
    def _storages(nested: Any) -> list[Any]:
        tensors = [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]
        return [shares.own(tensor).untyped_storage() for tensor in tensors]


def held_bytes(nested: Any) -> int:
    """In tensors of this process's own, by the memory that they keep alive."""
    tensors = [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]
    return sum(shares.own(tensor).untyped_storage().nbytes() for tensor in tensors)
