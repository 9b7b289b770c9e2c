"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from runner.errors import wrong
from runner.train.hook import Hook
from runner.train.run import Run


class EMA(Hook):
    """Averages the weights after each step, average += (1 - decay) * (weight - average), and evaluates with them.

    The averages are kept in float32 and saved in checkpoints; buffers are used as they are.

    Args:
        decay: between 0 and 1.
        evaluate: evaluate with the averaged weights (the trained ones come back after it).
    """

    def __init__(self, decay: float = 0.999, evaluate: bool = True) -> None:
        if not 0 <= decay < 1:
            raise wrong("hooks.ema.decay", "is not between 0 and 1", "0.999 is usual", value=decay)
        self.decay, self.evaluate = decay, evaluate
        self._names: list[str] = []
        self._weights: list[Tensor] = []
        self._averages: list[Tensor] = []
        self._loaded: Mapping[str, Tensor] | None = None

    def on_run_start(self, run: Run) -> None:
        named = [(name, p) for name, p in run.engine.model.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in named]
        self._weights = [parameter.detach() for _, parameter in named]
        source = self._weights if self._loaded is None else [self._loaded[name] for name in self._names]
        self._averages = [
            average.to(weight.device, torch.float32, copy=True)
            for average, weight in zip(source, self._weights, strict=True)
        ]
        self._step = run.progress.step
        if self.evaluate:
            run.evaluation_contexts.append(self.swapped)

    def on_step_end(self, run: Run) -> None:
        weights = self._weights
        if weights and weights[0].dtype != torch.float32:
            weights = [weight.float() for weight in weights]
        torch._foreach_lerp_(self._averages, weights, 1.0 - self.decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages in the place of the weights."""
        kept = [weight.clone() for weight in self._weights]
        _copy(self._weights, self._averages)
        try:
            yield
        finally:
            _copy(self._weights, kept)

    def state_dict(self) -> dict[str, Any]:
        return {"averages": dict(zip(self._names, self._averages, strict=True))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._loaded = state["averages"]


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    with torch.no_grad():
        for target, value in zip(to, source, strict=True):
            target.copy_(value)
