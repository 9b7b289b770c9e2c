"""One process: the model as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from runner.engine.backend import Backend, BuildModel, BuildOptimizer, Handle
from runner.engine.gradients import backward
from runner.engine.handle import LocalHandle
from runner.engine.mesh import Mesh
from runner.engine.model_state import ModelState, OptimizerState
from runner.engine.optimizer import plain_step, without_compiler
from runner.engine.precision import Precision
from runner.engine.scaler import Scaler
from runner.errors import Problem


class Single(Backend):
    name = "single"
    #: How many processes it takes at most; None for any number.
    most_processes: int | None = 1
    scaler: Scaler

    def __init__(self, device: torch.device, precision: Precision, mesh: Mesh) -> None:
        super().__init__(device, precision, mesh)
        self.scaler = Scaler(precision.loss_scaling, device, mesh.data_size)
        self._nothing = nullcontext()

    def check(self) -> list[Problem]:
        problems = super().check()
        size = self.mesh.data_size
        if self.most_processes is not None and size > self.most_processes:
            why = f"trains in one process, and there are {size}"
            problems.append(Problem("backend", why, "backend=ddp, or launch.nproc_per_node=1", value=self.name))
        return problems

    def prepare(self, build_model: BuildModel, build_optimizer: BuildOptimizer) -> None:
        self.model = self.place(build_model())
        without_compiler()
        self.handle = self.drive(build_optimizer(self.model))

    def adopt(
        self, models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]
    ) -> tuple[list[nn.Module], list[Handle]]:
        for optimizer in optimizers:
            plain_step(optimizer)  # what it refuses is refused before anything is placed
        return [self.place(model) for model in models], [self.drive(optimizer) for optimizer in optimizers]

    def place(self, model: nn.Module) -> nn.Module:
        """The model on the device, in the type of its weights."""
        return model.to(self.device, self.precision.param_dtype)

    def drive(self, optimizer: torch.optim.Optimizer) -> Handle:
        return LocalHandle(optimizer, self.scaler, self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        if not self.precision.autocast:
            return self._nothing
        return torch.autocast(self.device.type, dtype=self.precision.compute_dtype)

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        return self._nothing

    def backward(self, loss: Tensor, factor: Tensor | None, **options: Any) -> Tensor:
        if factor is None:
            factor = torch.ones_like(loss)
        if options:
            loss.backward(self.scaler.scale(factor), **options)
        else:
            backward(loss, self.scaler.scale(factor))
        return loss.detach() * factor

    def settle(self, skipped: bool) -> bool:
        return self.scaler.update(skipped)

    def state(self) -> Mapping[str, Any]:
        return {
            "model": ModelState(self.model),
            "optimizer": OptimizerState(self.model, self.optimizer),
            "scaler": self.scaler,
        }
