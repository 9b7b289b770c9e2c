"""What every backend does its own way. A difference between backends is a method here, never a branch elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runner.engine.mesh import Mesh
from runner.engine.model_state import trained_weights
from runner.engine.precision import Precision
from runner.engine.scaler import Scaler
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


class Handle(ABC):
    """One optimizer and the gradients it steps with: its words are separate here, and `step` is all of them.

    All words may be called on every micro-batch of every rank.
    """

    optimizer: torch.optim.Optimizer
    #: Of the optimizer, as they are in the placed model.
    parameters: Sequence[Tensor]
    #: Whether a step is skipped on the device, so that the host need not look first.
    device_decides = False

    @abstractmethod
    def unscale(self) -> None:
        """Makes the gradients the true ones; acts once a step."""

    @abstractmethod
    def not_finite(self) -> Tensor | None:
        """0 where this process's gradients are finite, else more (0-d float); None where the backend looks itself.

        A local answer: whoever decides adds up those of all processes.
        """

    @abstractmethod
    def norm(self) -> Tensor:
        """The global 2-norm of the true gradient, over all shards: 0-d float32, the same on every process."""

    @abstractmethod
    def clip(self, max_norm: float, norm: Tensor | None = None) -> Tensor:
        """Scales the gradients to a global norm of at most `max_norm`; returns the norm before."""

    @abstractmethod
    def clip_values(self, most: float) -> None:
        """Limits each element of the gradients to [-most, most]."""

    @abstractmethod
    def step(self, max_norm: float | None = None, *, skip: bool | Tensor = False, measure: bool = False) -> Update:
        """Unscale, clip to `max_norm`, step unless `skip`, zero. The loss scale is updated by `Backend.settle`.

        `measure` asks for the norm where nothing is clipped.
        """

    @abstractmethod
    def zero(self) -> None:
        """Frees the gradients."""


class Backend(ABC):
    """The adapter that places a model on the mesh, synchronises its gradients and steps its optimizer."""

    name: str
    #: Whether it needs a process group even for one process.
    grouped = False
    #: The optimizers of torch that it can step in one kernel (fused); None for all that have one.
    fused: Collection[str] | None = None
    model: nn.Module
    handle: Handle
    #: The loss scaling; None where the backend's library keeps its own.
    scaler: Scaler | None = None

    def __init__(self, device: torch.device, precision: Precision, mesh: Mesh) -> None:
        self.device = device
        self.precision = precision
        self.mesh = mesh

    def check(self) -> list[Problem]:
        """What cannot work, told before a model exists."""
        return self.precision.check(self.device)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.handle.optimizer

    @abstractmethod
    def prepare(self, build_model: BuildModel, build_optimizer: BuildOptimizer) -> None:
        """Builds `model` and `handle` in the order this backend needs. Every process has the same random state."""

    @abstractmethod
    def adopt(
        self, models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]
    ) -> tuple[list[nn.Module], list[Handle]]:
        """For people's own loops: places models that exist and gives a handle for each optimizer, in the same order.

        An optimizer may hold parameters of models of earlier calls. Its groups are pointed at the new parameters
        where placing a model replaces them. Raises InputError for what the backend cannot do.
        """

    @abstractmethod
    def autocast(self) -> AbstractContextManager[Any]:
        """Around every forward pass and loss."""

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward of a micro-batch; gradients travel with the last one of a step only."""
        return nullcontext()

    @abstractmethod
    def backward(self, loss: Tensor, factor: Tensor | None, **options: Any) -> Tensor:
        """Adds the gradient of factor * loss (both 0-d; no factor is 1) and returns factor * loss, detached.

        Gradients are averaged over the mesh's data readers. `options` are those of torch's own backward:
        retain_graph, create_graph, inputs. Raises InputError for what the backend cannot do.
        """

    @abstractmethod
    def settle(self, skipped: bool) -> bool:
        """Once after the steps of all handles: updates the loss scale. Whether an overflow made it smaller."""

    @abstractmethod
    def state(self) -> Mapping[str, Any]:
        """Stateful objects by name (model, optimizer, scaler), keyed by parameter name inside."""

    def extras(self) -> Mapping[str, Any]:
        """Further stateful objects by name, which a checkpoint of another backend lacks."""
        return {}

    def forgets(self) -> str | None:
        """Why several processes that go on from a checkpoint do not have the bits of those that were not stopped."""
        return None

    def kept(self) -> Mapping[str, Any] | None:
        """`state()` of the one model that was adopted with its optimizer, where they cannot tell it themselves."""
        return None

    def weights(self) -> dict[str, Tensor]:
        """The parameters that are trained, by the bare model's names: themselves, to be read and written in place.

        Each may be a DTensor, of which this process holds a part. Raises InputError where the backend keeps them
        elsewhere.
        """
        return trained_weights(self.model)

    def rewritten(self) -> None:
        """To be called after `weights` were written to: drops copies that were gathered of them."""

    def discard(self) -> None:
        """Throws away what a forward and backward have left, also broken off by an error: all processes call it."""
        self.handle.zero()

    def forget(self, model: nn.Module | None = None) -> None:
        """Drops gradients, of one model or all, that wait for the last micro-batch of a step that will not come."""

    def close(self) -> None:
        """Lets go of what needs the process group, before that ends; nothing is called afterwards."""

    def describe(self) -> list[str]:
        """Decisions on wrapping, sharding and precision, a line each, for `debug=true`."""
        return []
