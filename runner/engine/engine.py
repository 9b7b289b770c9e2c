"""What a loop talks to: forward, backward and step, the same words on any backend."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from runner import distributed
from runner.engine.backend import Backend, BuildModel, BuildOptimizer, Update
from runner.engine.gradients import wide
from runner.keyed import keyed, mixed


@dataclass(slots=True)
class Exchange:
    """What all processes know after the backward passes of a step.

    `loss` is the step's mean loss (0-d), `weight` the next step's weight, `flags` how many processes raised each
    flag, `skip` whether the step must change no weight: a bool, or a 0-d bool tensor where the device decides.
    """

    loss: Tensor
    weight: Any
    flags: Sequence[float]
    skip: bool | Tensor


class Engine:
    """The core of the engine: knows a backend, and neither a loop nor checkpoints.

    Example:
        engine = Engine(Single(device, precision, Mesh()))
        engine.prepare(lambda: nn.Linear(2, 1), lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
        with engine.accumulate(last=True):
            loss = loss_sum(engine.forward(inputs), targets)
            engine.backward(loss, engine.factor(weight))
        known = engine.exchange(loss.detach())
        update = engine.step(max_norm=1.0, skip=known.skip)
    """

    #: Into how many shards determinism=canonical cuts a step; 0 without it.
    shards = 0

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.device = backend.device
        self.precision = backend.precision
        self.mesh = backend.mesh
        self.autocast = backend.autocast
        self.accumulate = backend.accumulate
        self.backward = backend.backward
        self._seeds: dict[tuple[int, str], int] = {}
        #: By which the seeds of the processes differ.
        self._reader = backend.mesh.data_rank
        self._plain = not backend.precision.autocast and backend.precision.param_dtype is torch.float32
        self._factor: tuple[Any, Tensor] = (None, torch.zeros(()))
        #: Whether an exchange gives the flags of the one before; those of the last one are on their way to the host.
        self.flags_late = backend.device.type == "cuda"
        self._flags: tuple[Tensor, Any] | None = None

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
            inputs = floats_as(inputs, self.precision.param_dtype)
        with self.autocast():
            return floats_as(self._call(inputs), torch.float32)

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
            return (self.mesh.data_size / weight).to(self.device, torch.float32)
        if self._factor[0] != weight:
            # A step that counts nothing gives a loss that is not finite, and the policy for such steps decides.
            scale = self.mesh.data_size / weight if weight else math.inf
            self._factor = (weight, torch.tensor(scale, device=self.device))
        return self._factor[1]

    def exchange(self, loss: Tensor, weight: Any = 0, flags: Sequence[float] = (), *, guard: bool = True) -> Exchange:
        """Between the last backward and the step: what the processes must know of each other, in one small all-reduce.

        With `guard` a loss or gradient that is not finite anywhere makes the step one to skip; under loss scaling
        such a gradient always does. One process exchanges nothing. On a GPU the flags are those of the exchange
        before, the same on all processes: so nobody waits for the device.

        Args:
            loss: sum of what `backward` returned in this step (0-d).
            weight: this process's weight of the next step: a number or a 0-d tensor.
            flags: numbers to be added up over the processes.
        """
        looks = guard or self.precision.loss_scaling is not None
        found = self.backend.handle.not_finite() if looks else None
        if self.mesh.data_size == 1:
            return Exchange(loss, weight, flags, self._skip(found, loss if guard else None))
        vector = torch.zeros(3 + len(flags), dtype=wide(self.device), device=self.device)
        vector[0], vector[1] = loss, weight
        if found is not None:
            vector[2] = found
        for i, flag in enumerate(flags, 3):
            if flag:  # written by a kernel: copying a list would wait for the device
                vector[i] = float(flag)
        distributed.total(vector)
        mean = (vector[0] / self.mesh.data_size).float()
        skip = self._skip(vector[2] if looks else None, mean if guard else None)
        return Exchange(mean, vector[1], self._on_host(vector[3:]), skip)

    def _skip(self, found: Tensor | None, loss: Tensor | None) -> bool | Tensor:
        if found is None and loss is None:
            return False
        if self.backend.handle.device_decides:
            flag = torch.zeros((), dtype=torch.bool, device=self.device) if found is None else found.bool()
            return flag if loss is None else flag | ~torch.isfinite(loss)
        return bool(found is not None and found.item()) or not (loss is None or math.isfinite(loss.item()))

    def _on_host(self, flags: Tensor) -> list[float]:
        """The flags as numbers: of this exchange on a CPU, else of the one before."""
        if not self.flags_late:
            return flags.tolist()
        before = self._flags
        copy_, ready = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True), torch.cuda.Event()
        copy_.copy_(flags, non_blocking=True)
        ready.record()
        self._flags = (copy_, ready)
        if before is None:
            return [0.0] * flags.numel()
        before[1].synchronize()
        return before[0].tolist()

    def total(self, weight: Any) -> Any:
        """A step's weight over all processes: what the first step needs, before there was an exchange."""
        if self.mesh.data_size == 1:
            return weight
        return distributed.total(torch.as_tensor(weight, device=self.device).to(wide(self.device), copy=True))

    def unscale(self) -> None:
        """Makes the gradients the true ones; acts once a step."""
        self.backend.handle.unscale()

    def step(self, max_norm: float | None = None, *, skip: bool | Tensor = False, measure: bool = False) -> Update:
        """Unscale, clip, step unless `skip`, update the loss scale, zero; see Handle.step and Backend.settle."""
        update = self.backend.handle.step(max_norm, skip=skip, measure=measure)
        update.overflow = self.backend.settle(update.skipped is True)
        return update

    def seed(self, seed: int, step: int, what: str = "step") -> None:
        """Seeds torch's generators by (seed, `what`, step, data rank): randomness then needs no state to be saved."""
        if (seed, what) not in self._seeds:
            self._seeds[seed, what] = keyed(seed, what, self._reader)
        number = mixed(self._seeds[seed, what], step)
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)
        elif self.device.type == "mps":
            torch.mps.manual_seed(number)

    def state(self) -> Mapping[str, Any]:
        return self.backend.state()


def floats_as(value: Any, dtype: torch.dtype) -> Any:
    """The same nested structure with its floating-point tensors as `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) is dict:
        return {key: floats_as(item, dtype) for key, item in value.items()}
    if isinstance(value, MutableMapping):
        # A model's output class: a copy that is filled item by item, so that its attributes follow.
        filled = copy(value)
        for key, item in value.items():
            filled[key] = floats_as(item, dtype)
        return filled
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(floats_as(item, dtype) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(floats_as(item, dtype) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: floats_as(getattr(value, f.name), dtype) for f in fields(value) if f.init})
    return value
