"""One process: the model as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from runner.engine.backend import Backend, BuildModel, BuildOptimizer, Update
from runner.engine.gradients import Finite, backward, clip, global_norm
from runner.engine.model_state import ModelState, OptimizerState
from runner.engine.optimizer import plain_step, without_compiler
from runner.engine.scaler import Scaler


class Single(Backend):
    name = "single"

    def prepare(self, build_model: BuildModel, build_optimizer: BuildOptimizer) -> None:
        self.model = build_model().to(self.device, self.precision.param_dtype)
        without_compiler()
        self.optimizer = build_optimizer(self.model)
        self.scaler = Scaler(self.precision.loss_scaling, self.device)
        self._step = plain_step(self.optimizer)
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        # Elsewhere than on a CPU, looking at a number waits for all work that was queued before it.
        self._device_decides = fused and self.device.type != "cpu" and not self.scaler.active
        self._finite = Finite(self._parameters)
        self._nothing = nullcontext()
        self._unscaled = False

    def autocast(self) -> AbstractContextManager[Any]:
        if not self.precision.autocast:
            return self._nothing
        return torch.autocast(self.device.type, dtype=self.precision.compute_dtype)

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        return self._nothing

    def backward(self, loss: Tensor, factor: Tensor) -> Tensor:
        backward(loss, self.scaler.scale(factor))
        return loss.detach() * factor

    def unscale(self) -> None:
        if not self._unscaled:
            self._unscaled = True
            self.scaler.unscale(self.optimizer)

    def step(self, max_norm: float | None, *, guard: bool, loss: Tensor | None = None, measure: bool = False) -> Update:
        self.unscale()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        skipped = self._not_finite(gradients, loss if guard else None) if guard or self.scaler.active else False
        norm = global_norm(gradients) if measure or max_norm is not None or skipped is True else None
        if skipped is not True:
            with torch.no_grad():
                if max_norm is not None and norm is not None:
                    clip(gradients, norm, max_norm)
                if skipped is not False:
                    # The words by which torch's fused optimizers let the device skip a step.
                    self.optimizer.grad_scale, self.optimizer.found_inf = None, skipped.float()  # type: ignore[attr-defined]
                self._step()
        overflow = self.scaler.update(skipped is True)
        for parameter in self._parameters:
            parameter.grad = None
        self._unscaled = False
        return Update(norm, skipped, overflow)

    def _not_finite(self, gradients: list[Tensor], loss: Tensor | None) -> bool | Tensor:
        found = self._finite.found(gradients)
        if self._device_decides:
            return found.bool() if loss is None else found.bool() | ~torch.isfinite(loss)
        return bool(found.item()) or not (loss is None or math.isfinite(loss.item()))

    def state(self) -> Mapping[str, Any]:
        return {
            "model": ModelState(self.model),
            "optimizer": OptimizerState(self.model, self.optimizer),
            "scaler": self.scaler,
        }
