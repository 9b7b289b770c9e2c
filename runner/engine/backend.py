"""What every backend does its own way. A difference between backends is a method here, never a branch elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runner.engine.mesh import Mesh
from runner.engine.precision import Precision
from runner.errors import Problem

BuildModel = Callable[[], nn.Module]
BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(slots=True)
class Update:
    """What became of one optimizer step.

    `grad_norm` is the global norm of the true gradient before clipping (0-d), None where nobody asked. `skipped` says
    that weights and optimizer stayed as they were because something was not finite: a bool, or a 0-d bool tensor
    where the device decided and the host has not looked. `overflow` says that loss scaling caused it, and has a
    smaller scale to try.
    """

    grad_norm: Tensor | None = None
    skipped: bool | Tensor = False
    overflow: bool = False


class Backend(ABC):
    """The adapter that places a model on the mesh, synchronises its gradients and steps its optimizer."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, device: torch.device, precision: Precision, mesh: Mesh) -> None:
        self.device = device
        self.precision = precision
        self.mesh = mesh

    def check(self) -> list[Problem]:
        """What cannot work, told before a model exists."""
        return self.precision.check(self.device)

    @abstractmethod
    def prepare(self, build_model: BuildModel, build_optimizer: BuildOptimizer) -> None:
        """Builds `model` and `optimizer` in the order this backend needs."""

    @abstractmethod
    def autocast(self) -> AbstractContextManager[Any]:
        """Around every forward pass and loss."""

    @abstractmethod
    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward of a micro-batch; gradients travel with the last one of a step only."""

    @abstractmethod
    def backward(self, loss: Tensor, factor: Tensor) -> Tensor:
        """Adds the gradient of factor * loss (both 0-d) and returns factor * loss, detached."""

    @abstractmethod
    def unscale(self) -> None:
        """Makes the gradients the true ones; acts once a step."""

    @abstractmethod
    def step(self, max_norm: float | None, *, guard: bool, loss: Tensor | None = None, measure: bool = False) -> Update:
        """Unscale, clip to `max_norm`, step, update the loss scale, zero: one word.

        With `guard` a `loss` or gradient that is not finite leaves weights and optimizer as they are; under loss
        scaling such a gradient always does. `measure` asks for the gradient norm where nothing is clipped.
        """

    @abstractmethod
    def state(self) -> Mapping[str, Any]:
        """Stateful objects by name (model, optimizer, scaler), keyed by parameter name inside."""
