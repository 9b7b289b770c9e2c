"""A prepared optimizer: its words may be called with every micro-batch and act when gradients are synchronised."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from runner import distributed
from runner.engine.backend import Handle
from runner.errors import wrong

if TYPE_CHECKING:
    from runner.api.gradients import Gradients


class PreparedOptimizer(Optimizer):
    """Wraps a user's optimizer; groups, state and everything else are that optimizer's own.

    `optimizer` is the user's, `handle` the backend's word for it (None until its model is prepared too),
    `step_was_skipped` whether the last step changed nothing because of an overflow, `taken` and `skipped` count.
    """

    def __init__(self, optimizer: Optimizer, gradients: Gradients) -> None:
        self.optimizer = optimizer
        self._gradients: Gradients | None = gradients
        self.handle: Handle | None = None
        self.step_was_skipped = False
        self.taken = self.skipped = 0
        #: Whether this process's gradients are finite (0), once they were looked at.
        self.overflow: Tensor | None = None
        #: Whether the gradients at hand have been stepped with.
        self._used = False

    # --- what is the user's optimizer's own --------------------------------------------------------------------------

    @property  # type: ignore[override]
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property  # type: ignore[override]
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property  # type: ignore[override]
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"PreparedOptimizer({self.optimizer!r})"

    def __getstate__(self) -> dict[str, Any]:
        # Handles belong to a process group; what comes out of a pickle is the plain optimizer in the same dress.
        return {"optimizer": self.optimizer, "taken": self.taken, "skipped": self.skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(
            {"_gradients": None, "handle": None, "step_was_skipped": False, "overflow": None, "_used": False, **state}
        )

    # --- what follows the micro-batches ------------------------------------------------------------------------------

    def parameters(self) -> list[Tensor]:
        """Those that it was given, and those that a backend steps in their place."""
        found = {} if self.handle is None else {id(p): p for p in self.handle.parameters}
        return list((found | {id(p): p for group in self.optimizer.param_groups for p in group["params"]}).values())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Frees the gradients, once they have been stepped with or before the first backward of a step.

        In between, while micro-batches accumulate, it does nothing.
        """
        if self._gradients is None:
            return self.optimizer.zero_grad(set_to_none)
        if not self._used and self._gradients.pending():
            return None
        self._used = False
        self.drop(set_to_none)
        return None

    def drop(self, set_to_none: bool = True) -> None:
        """Frees the gradients in any case."""
        kept = [] if set_to_none else [(p, p.grad) for p in self.parameters() if p.grad is not None]
        if self.handle is not None:
            self.handle.zero()
        else:
            self.optimizer.zero_grad()
        for parameter, gradient in kept:
            parameter.grad = gradient.detach().zero_()
        self.overflow = None

    def unscale(self) -> None:
        """Makes the gradients the true ones and notes an overflow before anything is clipped."""
        assert self._gradients is not None
        handle = self.driven()
        handle.unscale()
        if self._gradients.scaled and self.overflow is None:
            found = handle.not_finite()
            self.overflow = None if found is None else found.detach().clone()

    def driven(self) -> Handle:
        """The handle. Raises InputError where the optimizer's parameters belong to no prepared model."""
        if self.handle is None:
            why = f"{type(self.optimizer).__name__} holds parameters that belong to no prepared model"
            raise wrong("prepare", why, "prepare the model that owns them as well")
        return self.handle

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Steps, unless more micro-batches are to come; skipped on all processes where an overflow was on any."""
        if self._gradients is None:
            return self.optimizer.step(closure)
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if not self._gradients.synchronised:
            return result
        handle = self.driven()
        self.unscale()
        skip = self.overflow is not None and bool(distributed.total(self.overflow).item())
        # The backend frees gradients with the step; a user's loop may still want to look at them.
        kept = [(p, p.grad) for p in self.parameters() if p.grad is not None]
        skipped = bool(handle.step(skip=skip).skipped)
        for parameter, gradient in kept:
            parameter.grad = gradient
        self.overflow = None
        self._used = True
        self.step_was_skipped = skipped
        self.taken, self.skipped = self.taken + (not skipped), self.skipped + skipped
        self._gradients.stepped(self, skipped)
        return result

    def train(self) -> None:
        """For optimizers that have modes of their own."""
        if callable(mode := getattr(self.optimizer, "train", None)):
            mode()

    def eval(self) -> None:
        """For optimizers that have modes of their own."""
        if callable(mode := getattr(self.optimizer, "eval", None)):
            mode()
