"""Tensors in the host's memory of which each process holds a part, as torch's DTensor: saved and loaded in parts."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from runner import distributed


def cut(full: Tensor) -> Tensor:
    """This process's part of a value that every process has whole; a copy, so the whole may go."""
    dim = dimension(full.shape, distributed.world_size())
    if dim is None:
        return full.detach().to("cpu", copy=True)
    start, size = _rows(full.shape[dim])
    part = full.detach().narrow(dim, start, size).clone(memory_format=torch.contiguous_format).cpu()
    return _of_part(part, full.shape, dim)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """This process's part of a tensor to be filled."""
    return _made(shape, lambda local: torch.empty(local, dtype=dtype))


def stand_in(shape: Sequence[int]) -> Tensor:
    """A float32 tensor cut as `cut` does it, that takes no memory: one number in the place of all."""
    return _made(shape, lambda local: torch.empty(()).expand(local))


def row(own: Tensor) -> Tensor:
    """Each process's tensor of one shape and type as a row of one tensor, in rank order: nothing is sent."""
    own = own.detach().cpu().unsqueeze(0)
    size = distributed.world_size()
    return own if size == 1 else _of_part(own, torch.Size([size, *own.shape[1:]]), 0)


def own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    kind = sys.modules.get("torch.distributed.tensor")
    return tensor.to_local() if kind is not None and isinstance(tensor, kind.DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be shared out; where it is, all processes call it together."""
    kind = sys.modules.get("torch.distributed.tensor")
    return tensor.full_tensor() if kind is not None and isinstance(tensor, kind.DTensor) else tensor


def dimension(shape: Sequence[int], size: int) -> int | None:
    """The dimension along which `size` processes share a tensor most evenly, the first of several; None for whole.

    Whole is what has no element or no dimension, and all in a job of one process. A tensor of one row is cut along
    another dimension: else the first process would hold all of it.
    """
    if size == 1 or not math.prod(shape) or not shape:
        return None
    return min(range(len(shape)), key=lambda dim: math.ceil(shape[dim] / size) / shape[dim])


def _rows(length: int) -> tuple[int, int]:
    """(first, number) of this process's rows: as torch's Shard deals them out, the last processes may have none."""
    most = -(-length // distributed.world_size())
    start = min(distributed.rank() * most, length)
    return start, min(most, length - start)


def _made(shape: Sequence[int], make: Callable[[Sequence[int]], Tensor]) -> Tensor:
    dim = dimension(shape, distributed.world_size())
    if dim is None:
        return make(shape)
    local = [*shape[:dim], _rows(shape[dim])[1], *shape[dim + 1 :]]
    return _of_part(make(local), torch.Size(shape), dim)


def _of_part(part: Tensor, shape: torch.Size, dim: int) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(part, _mesh(), [Shard(dim)], run_check=False, shape=shape, stride=strides)


def _mesh() -> Any:
    """All processes of the present group; all ask for it together the first time."""
    return _mesh_of(weakref.ref(torch.distributed.group.WORLD))


@cache
def _mesh_of(world: weakref.ref[Any]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (distributed.world_size(),))
