"""What a loop talks to: forward, backward and step, the same words on any backend."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from copy import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from runner.engine.backend import Backend, BuildModel, BuildOptimizer, Update
from runner.keyed import keyed, mixed


class Engine:
    """The core of the engine: knows a backend, and neither a loop nor checkpoints.

    Example:
        engine = Engine(Single(device, precision, Mesh()))
        engine.prepare(lambda: nn.Linear(2, 1), lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
        with engine.accumulate(last=True):
            loss = loss_sum(engine.forward(inputs), targets)
            engine.backward(loss, engine.factor(weight))
        update = engine.step(max_norm=1.0)
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.device = backend.device
        self.precision = backend.precision
        self.mesh = backend.mesh
        self.autocast = backend.autocast
        self.accumulate = backend.accumulate
        self.backward = backend.backward
        self.unscale = backend.unscale
        self._seed: tuple[int | None, int] = (None, 0)
        self._plain = not backend.precision.autocast and backend.precision.param_dtype is torch.float32
        self._factor: tuple[Any, Tensor] = (None, torch.zeros(()))

    def prepare(self, build_model: BuildModel, build_optimizer: BuildOptimizer) -> None:
        """Builds model and optimizer in the backend's order and places them."""
        self.backend.prepare(build_model, build_optimizer)

    @property
    def model(self) -> nn.Module:
        return self.backend.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.backend.optimizer

    def forward(self, inputs: Any) -> Any:
        """Calls the model: a tuple gives positional, a dict keyword arguments, anything else is the one argument.

        Floating-point outputs of an autocast are float32 to the caller, so that losses are computed alike everywhere.
        """
        if self._plain:
            return self._call(inputs)
        if self.precision.param_dtype is not torch.float32:
            inputs = _floats_as(inputs, self.precision.param_dtype)
        with self.autocast():
            return _floats_as(self._call(inputs), torch.float32)

    def _call(self, inputs: Any) -> Any:
        if isinstance(inputs, Tensor):
            return self.backend.model(inputs)
        if isinstance(inputs, Mapping):
            return self.backend.model(**inputs)
        if isinstance(inputs, tuple):
            return self.backend.model(*inputs)
        return self.backend.model(inputs)

    def factor(self, weight: int | float | Tensor) -> Tensor:
        """What a micro-batch's summed loss is multiplied with: data readers / weight of the whole step (0-d).

        The gradients of N readers are averaged, hence the N.
        """
        if isinstance(weight, Tensor):
            return self.mesh.data_size / weight.to(torch.float32)
        if self._factor[0] != weight:
            self._factor = (weight, torch.tensor(self.mesh.data_size / weight, device=self.device))
        return self._factor[1]

    def step(
        self,
        max_norm: float | None = None,
        *,
        guard: bool = True,
        loss: Tensor | None = None,
        measure: bool = False,
    ) -> Update:
        """Unscale, clip, step, zero; see Backend.step."""
        return self.backend.step(max_norm, guard=guard, loss=loss, measure=measure)

    def seed(self, seed: int, step: int) -> None:
        """Seeds torch's generators by (seed, step, data rank): randomness then needs no state to be saved."""
        if self._seed[0] != seed:
            self._seed = (seed, keyed(seed, "step", self.mesh.data_rank))
        number = mixed(self._seed[1], step)
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)
        elif self.device.type == "mps":
            torch.mps.manual_seed(number)

    def state(self) -> Mapping[str, Any]:
        return self.backend.state()


def _floats_as(value: Any, dtype: torch.dtype) -> Any:
    """The same nested structure with its floating-point tensors as `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) is dict:
        return {key: _floats_as(item, dtype) for key, item in value.items()}
    if isinstance(value, MutableMapping):
        # A model's output class: a copy that is filled item by item, so that its attributes follow.
        filled = copy(value)
        for key, item in value.items():
            filled[key] = _floats_as(item, dtype)
        return filled
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_floats_as(item, dtype) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_floats_as(item, dtype) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _floats_as(getattr(value, f.name), dtype) for f in fields(value) if f.init})
    return value
