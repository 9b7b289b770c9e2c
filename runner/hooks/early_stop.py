"""Stops a run whose metric no longer gets better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from runner.errors import wrong
from runner.train.hook import Hook
from runner.train.run import Run


class EarlyStop(Hook):
    """Stops after `patience` evaluations in a row without an improvement of more than `min_delta`.

    Args:
        metric: name in the evaluation record.
        mode: "min" or "max", which way is better.
        patience: evaluations without improvement that are borne.
        min_delta: what counts as an improvement.
    """

    def __init__(self, metric: str = "loss", mode: str = "min", patience: int = 3, min_delta: float = 0.0) -> None:
        if mode not in ("min", "max"):
            raise wrong("hooks.early_stop.mode", "is neither min nor max", "give one of them", value=mode)
        if patience < 1:
            raise wrong("hooks.early_stop.patience", "must be at least 1", "give a larger number", value=patience)
        self.metric, self.patience, self.min_delta = metric, patience, min_delta
        self._sign = 1.0 if mode == "max" else -1.0
        self._best: float | None = None
        self._waited = 0

    def on_eval_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        if self.metric not in metrics:
            raise wrong(
                "hooks.early_stop.metric",
                "no evaluation reports it",
                f"choose of {', '.join(name for name in metrics if name != 'samples')}",
                value=self.metric,
            )
        value = self._sign * metrics[self.metric]
        if not math.isnan(value) and (self._best is None or value > self._best + self.min_delta):
            self._best, self._waited = value, 0
            return
        self._waited += 1
        if self._waited >= self.patience:
            best = "not a number" if self._best is None else f"not better than {self._sign * self._best:.6g}"
            run.stop(f"{self.metric} has been {best} for {self._waited} evaluations (early_stop)")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best, self._waited = state["best"], state["waited"]
