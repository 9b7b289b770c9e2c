"""Buffers that a training moves (running means, codebooks), the same in all processes: those of the first one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def follow_first(model: nn.Module, moved: Callable[[], bool]) -> None:
    """Before a forward pass that follows a training step, gives every process the first one's buffers.

    The rule of DistributedDataParallel, for models that it does not wrap. `moved` says, in a forward pass with
    gradients, whether the buffers are to be sent before the next one.
    """
    if not _persistent(model):
        return
    due = True

    def before(*_: Any) -> None:
        nonlocal due
        if due and dist.get_world_size() > 1:
            _broadcast(_persistent(model))
        due = torch.is_grad_enabled() and moved()

    model.register_forward_pre_hook(before)


def _persistent(model: nn.Module) -> list[Tensor]:
    """The buffers that belong to the model's state."""
    return [
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]


def _broadcast(buffers: Sequence[Tensor]) -> None:
    """The first process's values on all, one message a type."""
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(buffers)):
        for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):
            same = [buffer for buffer in buffers if buffer.dtype == dtype]
            flat = torch.cat([buffer.flatten() for buffer in same])
            dist.broadcast(flat, 0)
            for buffer, values in zip(same, flat.split([buffer.numel() for buffer in same]), strict=True):
                buffer.copy_(values.view_as(buffer))
