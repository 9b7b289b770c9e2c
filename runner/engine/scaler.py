"""Dynamic loss scaling with a floor, over torch.amp.GradScaler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from runner.engine.precision import LossScaling


class Scaler:
    """torch.amp.GradScaler where a precision wants it, nothing where not; the same state keys in both cases.

    GradScaler alone goes on halving its scale under a permanent overflow, reaches 0 after 166 steps and then lets
    NaN into the weights, so the scale has a floor.

    Gradients of several data `readers` are averaged, so each reader's loss is multiplied with their number: the scale
    is divided by it. Then what flows through the layers has the same size, and overflows at the same step, whatever
    the number of processes. Scales given, told and saved are those of one reader.
    """

    def __init__(self, options: LossScaling | None, device: torch.device, readers: int = 1) -> None:
        self._scaler = None
        self._readers = readers
        if options is not None:
            self._floor = options.floor / readers
            self._scaler = torch.amp.GradScaler(
                device.type,
                init_scale=options.init_scale / readers,
                growth_factor=options.growth_factor,
                backoff_factor=options.backoff_factor,
                growth_interval=options.growth_interval,
            )

    @property
    def active(self) -> bool:
        return self._scaler is not None

    @property
    def value(self) -> float:
        """The loss scale, 1 where none is used."""
        return 1.0 if self._scaler is None else self._scaler.get_scale() * self._readers

    def scale(self, factor: Tensor) -> Tensor:
        return factor if self._scaler is None else self._scaler.scale(factor)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        if self._scaler is not None:
            # An optimizer may step twice between two updates of the scale: a critic does.
            self._scaler._per_optimizer_states.pop(id(optimizer), None)
            self._scaler.unscale_(optimizer)

    def update(self, skipped: bool) -> bool:
        """After the steps of all optimizers. Whether an overflow has led to a smaller scale, to be tried next."""
        if self._scaler is None:
            return False
        before = self._scaler.get_scale()
        found = [
            flag
            for state in self._scaler._per_optimizer_states.values()
            for flag in state["found_inf_per_device"].values()
        ]
        if not found:
            return False
        for flag in found:
            # An overflow may have been in another process's gradients only.
            flag.fill_(float(skipped))
        self._scaler.update()
        if self._scaler.get_scale() < self._floor:
            self._scaler.update(self._floor)
        return skipped and self._scaler.get_scale() < before

    def state_dict(self) -> dict[str, Any]:
        state = {} if self._scaler is None else self._scaler.state_dict()
        return {"scale": state.get("scale", 0.0) * self._readers, "growth_tracker": state.get("_growth_tracker", 0)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the scale of a checkpoint; one saved without loss scaling leaves the configured scale."""
        if self._scaler is not None and state["scale"]:
            fresh = self._scaler.state_dict()
            self._scaler.load_state_dict(
                {**fresh, "scale": state["scale"] / self._readers, "_growth_tracker": int(state["growth_tracker"])}
            )
