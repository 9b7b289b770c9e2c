"""One optimizer over parameters of which every process holds its own rows (torch's DTensor)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from runner.engine.gradients import global_norm, wide
from runner.engine.handle import LocalHandle
from runner.engine.scaler import Scaler


class ShardedHandle(LocalHandle):
    """Looks at this process's rows; only the norm needs the other processes of its shard group.

    The optimizer itself steps DTensors, so one that looks at whole matrices (Adafactor) stays right. Parameters that
    are whole on every process are in groups of their own, because torch steps a group in one kernel.

    Args:
        group: the processes that hold a whole model together; None for one process.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, scaler: Scaler, device: torch.device, group: ProcessGroup | None
    ) -> None:
        self._group = group
        self._device = device
        self._stand_ins = _Parts()
        _one_kind_a_group(optimizer)
        super().__init__(optimizer, scaler, device)

    def local(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [local(tensor) for tensor in tensors]

    def unscale(self) -> None:
        """Unscales this process's rows: torch's own way for DTensors would talk to the other processes each time."""
        if self._unscaled:
            return
        self._unscaled = True
        self._refresh()
        if self._scaler.active:
            self._stand_ins.fill(self.parameters)
            self._scaler.unscale(self._stand_ins)  # type: ignore[arg-type]
            self._stand_ins.empty()

    def norm(self) -> Tensor:
        self.unscale()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        parts = [local(gradient) for gradient in gradients if _is_split(gradient)]
        whole = [local(gradient) for gradient in gradients if not _is_split(gradient)]
        dtype = wide(self._device)
        squares = global_norm(parts).to(self._device, dtype).square()
        if self._group is not None:
            dist.all_reduce(squares, group=self._group)
        if whole:
            squares += global_norm(whole).to(self._device, dtype).square()
        return squares.sqrt().float()


class _Parts:
    """In the place of an optimizer for GradScaler: this process's rows of the gradients."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, list[Tensor]]] = [{"params": []}]

    def fill(self, parameters: Sequence[Tensor]) -> None:
        found = []
        for parameter in parameters:
            if parameter.grad is not None:
                part = local(parameter).detach()
                part.grad = local(parameter.grad)
                found.append(part)
        self.param_groups[0]["params"] = found

    def empty(self) -> None:
        self.param_groups[0]["params"] = []


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, as a plain one that shares its memory."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _is_split(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) and any(placement.is_shard() for placement in tensor.placements)


def _one_kind_a_group(optimizer: torch.optim.Optimizer) -> None:
    """Moves parameters that are no DTensors out of groups with such, into groups at the end with the same values."""
    for group in list(optimizer.param_groups):
        plain = [p for p in group["params"] if not isinstance(p, DTensor)]
        if plain and len(plain) < len(group["params"]):
            group["params"][:] = [p for p in group["params"] if isinstance(p, DTensor)]
            optimizer.param_groups.append({**group, "params": plain})
