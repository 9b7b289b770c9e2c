"""Weights and gradients as plain numbers, whole on any backend."""

from __future__ import annotations

from typing import Any

from torch import nn

from runner import Engine


def state(engine: Engine, model: nn.Module) -> list[float]:
    """All weights in the order of their names, shards put together."""
    return flat(engine.get_state_dict(model))


def bare_state(model: nn.Module) -> list[float]:
    return flat(model.state_dict())


def flat(found: dict[str, Any]) -> list[float]:
    return [number for name in sorted(found) for number in found[name].double().flatten().tolist()]


def gradient(model: nn.Module) -> list[float]:
    """The gradients of all parameters that have one."""
    gradients: list[Any] = [p.grad for p in model.parameters() if p.grad is not None]
    return [x for g in gradients for x in (g.full_tensor() if hasattr(g, "full_tensor") else g).flatten().tolist()]
