"""Memory in which a state waits to be written while the training changes the original."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

_Key = TypeVar("_Key", bound=Hashable)


class Staging:
    """One buffer a tensor, on the CPU, used again at every save; page-locked for what comes from a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[Hashable, Tensor] = {}

    def copies(self, tensors: Mapping[_Key, Tensor]) -> dict[_Key, Tensor]:
        """The tensors as they are now. Valid until the next call, which writes into the same memory."""
        before, self._buffers = self._buffers, {}
        found: dict[_Key, Tensor] = {}
        with torch.no_grad():
            for key, tensor in tensors.items():
                buffer = before.get(key)
                if not _suits(buffer, tensor):
                    buffer = torch.empty(
                        tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.device.type == "cuda"
                    )
                assert buffer is not None
                found[key] = self._buffers[key] = buffer.copy_(tensor, non_blocking=tensor.device.type == "cuda")
        if any(tensor.device.type == "cuda" for tensor in tensors.values()):
            torch.cuda.synchronize()
        return found


def _suits(buffer: Tensor | None, tensor: Tensor) -> bool:
    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
        return False
    return tensor.device.type != "cuda" or buffer.is_pinned()
