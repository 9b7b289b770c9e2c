"""One optimizer of torch's and the gradients it steps with, where every process holds whole gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runner.engine.backend import Handle, Update
from runner.engine.gradients import Finite, clip, global_norm
from runner.engine.optimizer import plain_step
from runner.engine.scaler import Scaler


class LocalHandle(Handle):
    """Unscale, measure, clip and step on this process alone: what it sees of a gradient is the whole of it."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: Scaler, device: torch.device) -> None:
        self.optimizer = optimizer
        self._scaler = scaler
        self._step = plain_step(optimizer)
        self._groups = 0
        self._refresh()
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        # Elsewhere than on a CPU, looking at a number waits for all work that was queued before it.
        there = all(p.device.type != "cpu" for p in self.parameters)
        self.device_decides = fused and there and not scaler.active
        self._unscaled = False

    def _refresh(self) -> None:
        """The parameters, anew where a group has come."""
        groups = self.optimizer.param_groups
        if len(groups) != self._groups:
            self._groups = len(groups)
            self.parameters: Sequence[Tensor] = [p for group in groups for p in group["params"]]
            self._finite = Finite(self.local(self.parameters))

    def local(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This process's part of parameters or gradients."""
        return list(tensors)

    def gradients(self) -> list[Tensor]:
        """This process's part of the gradients that are there."""
        return self.local([p.grad for p in self.parameters if p.grad is not None])

    def unscale(self) -> None:
        if not self._unscaled:
            self._unscaled = True
            self._refresh()
            self._scaler.unscale(self.optimizer)

    def not_finite(self) -> Tensor | None:
        self.unscale()
        return self._finite.found(self.gradients())

    def norm(self) -> Tensor:
        self.unscale()
        return global_norm(self.gradients())

    def clip(self, max_norm: float, norm: Tensor | None = None) -> Tensor:
        norm = self.norm() if norm is None else norm
        with torch.no_grad():
            clip(self.gradients(), norm, max_norm)
        return norm

    def clip_values(self, most: float) -> None:
        self.unscale()
        with torch.no_grad():
            for gradient in self.gradients():
                gradient.clamp_(-most, most)

    def step(self, max_norm: float | None = None, *, skip: bool | Tensor = False, measure: bool = False) -> Update:
        self.unscale()
        norm = self.norm() if measure or max_norm is not None or skip is True else None
        if skip is not True:
            with torch.no_grad():
                if max_norm is not None:
                    self.clip(max_norm, norm)
                if skip is not False:
                    # The words by which torch's fused optimizers let the device skip a step.
                    self.optimizer.grad_scale, self.optimizer.found_inf = None, skip.float()  # type: ignore[attr-defined]
                self._step()
        self.zero()
        return Update(norm, skip)

    def zero(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        self._unscaled = False
