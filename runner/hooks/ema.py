"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from runner.engine.engine import Engine
from runner.engine.model_state import compare_names, placed_as
from runner.errors import wrong
from runner.train.hook import Hook
from runner.train.run import Run


class EMA(Hook):
    """Averages the weights after each step, average += (1 - decay) * (weight - average), and evaluates with them.

    The averages are kept in float32 and lie as the weights do: where a backend shards these, each process keeps,
    saves and loads its part, whatever the number of parts was when they were saved. Buffers are used as they are.

    Args:
        decay: between 0 and 1.
        evaluate: evaluate with the averaged weights (the trained ones come back after it).
    """

    def __init__(self, decay: float = 0.999, evaluate: bool = True) -> None:
        if not 0 <= decay < 1:
            raise wrong("hooks.ema.decay", "is not between 0 and 1", "0.999 is usual", value=decay)
        self.decay, self.evaluate = decay, evaluate
        self._weights: list[Tensor] = []
        self._averages: list[Tensor] = []
        self._saved: dict[str, Tensor] = {}
        self._loaded = False

    def placed(self, engine: Engine) -> None:
        """The model is where it is to be trained, and nothing is loaded yet."""
        weights = engine.backend.weights()
        self._backend = engine.backend
        self._saved = {name: weight.detach().to(torch.float32, copy=True) for name, weight in weights.items()}
        # Of sharded weights each process averages its own part.
        self._weights = [_own(weight.detach()) for weight in weights.values()]
        self._averages = [_own(average) for average in self._saved.values()]
        self._loaded = False

    def on_run_start(self, run: Run) -> None:
        if not self._saved:
            self.placed(run.engine)
        # Anew, for loading may have put others in their place.
        self._weights = [_own(weight.detach()) for weight in run.engine.backend.weights().values()]
        if not self._loaded:
            _copy(self._averages, self._weights)
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
        self._backend.rewritten()
        try:
            yield
        finally:
            _copy(self._weights, kept)
            self._backend.rewritten()

    def state_dict(self) -> dict[str, Any]:
        """The averages themselves."""
        return {"averages": self._saved}

    def template(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The averages, to be filled in place. Raises InputError where they are of other weights."""
        compare_names("the averaged weights", self._saved, saved["averages"])
        return {"averages": self._saved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        compare_names("the averaged weights", self._saved, state["averages"])
        for name, average in self._saved.items():
            value = state["averages"][name]
            if value is not average:
                average.copy_(placed_as(average, value))
        self._loaded = True


def _own(tensor: Tensor) -> Tensor:
    """This process's part."""
    return getattr(tensor, "_local_tensor", tensor)


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    with torch.no_grad():
        for target, value in zip(to, source, strict=True):
            target.copy_(value)
