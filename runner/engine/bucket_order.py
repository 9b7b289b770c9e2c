"""The order in which DistributedDataParallel lays gradients into its buckets, kept over interruptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from runner import distributed
from runner.engine.model_state import trained_weights


class BucketOrder:
    """Parameter names of each model, in the order in which their gradients came in the first backward that sent them.

    In that backward torch has one bucket for all; from the next step on it has those that suit the order. Where an
    element lies decides in which order the values of three or more processes are added up, so a process that goes on
    from a checkpoint takes the order over before its first step: it has the bits of one that nobody stopped. Only what
    differs in no other way is known again: models with gradients that are sparse, or whose parameters have hooks that
    a gradient of zeros would set off, learn theirs anew (`unknown`).
    """

    def __init__(self) -> None:
        self._models: list[_Model] = []

    def add(self, model: DistributedDataParallel) -> None:
        """Listens to a model whose gradients have not been sent yet."""
        self._models.append(_Model(model))

    @property
    def listens(self) -> bool:
        """Whether there is a model of which nothing was sent yet."""
        return any(one.listens for one in self._models)

    def came(self) -> None:
        """To be called after a backward, as long as it `listens`."""
        for one in self._models:
            if one.coming:
                one.stop()

    def discard(self) -> None:
        """A backward has broken off."""
        for one in self._models:
            one.coming.clear()

    @property
    def unknown(self) -> bool:
        """Whether a model's order cannot be taken over from a checkpoint."""
        return any(one.unknown for one in self._models)

    def state_dict(self) -> dict[str, Any]:
        """{"models": [[names] or None where there was no such backward]}."""
        return {"models": [one.order for one in self._models]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Lets the steps have the saved buckets, from the first one on; all processes call it.

        Another model's order is left alone, and so are buckets that are there already: torch makes them once.
        """
        pairs = list(zip(self._models, state["models"], strict=False))
        able = distributed.gather([order is not None and one.takes(order) for one, order in pairs])
        for (one, order), each in zip(pairs, zip(*able, strict=True), strict=True):
            if all(each):  # they send zeros together
                one.take(order)


class _Model:
    """One model: its order, None as long as it is not known."""

    def __init__(self, model: DistributedDataParallel) -> None:
        self.model = model
        self.order: list[str] | None = None
        self.coming: list[str] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._comes(name))
            for name, parameter in trained_weights(model).items()
        ]

    def _comes(self, name: str) -> None:
        if self.model.require_backward_grad_sync:
            self.coming.append(name)

    @property
    def listens(self) -> bool:
        return bool(self._hooks)

    def stop(self) -> None:
        """Takes what came for the order."""
        for handle in self._hooks:
            handle.remove()
        self._hooks, coming, self.coming = [], self.coming, []
        if not self.unknown and len(coming) == len(trained_weights(self.model)):
            self.order = coming

    @property
    def unknown(self) -> bool:
        others = 1 if self._hooks else 0
        hooks = (getattr(p, "_post_accumulate_grad_hooks", None) for p in trained_weights(self.model).values())
        return any(len(found or ()) > others for found in hooks) or any(
            getattr(module, "sparse", False) is True for module in self.model.modules()
        )

    def takes(self, order: list[str]) -> bool:
        return self.listens and not self.unknown and sorted(order) == sorted(trained_weights(self.model))

    def take(self, order: list[str]) -> None:
        """A backward of zeros in which the gradients come in this order. They are freed again."""
        weights = trained_weights(self.model)
        parameters = [weights[name] for name in order]
        with torch.enable_grad():
            chain = torch.zeros((), device=parameters[0].device, requires_grad=True)
            for parameter in reversed(parameters):
                chain = _Zeros.apply(chain, parameter)
        self.model.reducer.prepare_for_backward([])
        chain.backward()  # type: ignore[no-untyped-call]
        for parameter in parameters:
            parameter.grad = None
        self.stop()
        self.order = list(order)


class _Zeros(torch.autograd.Function):
    """Hands a number on; in the backward its parameter gets a gradient of zeros, before those further down do."""

    @staticmethod
    def forward(ctx: Any, chain: Tensor, parameter: Tensor) -> Tensor:
        ctx.save_for_backward(parameter)
        return chain.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (parameter,) = ctx.saved_tensors
        return gradient, torch.zeros_like(parameter)
