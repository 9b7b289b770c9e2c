"""Records the gradient norm."""

from __future__ import annotations

from runner.train.hook import Hook
from runner.train.run import Run


class GradientNorm(Hook):
    """`grad_norm`, the global 2-norm of the true gradient before clipping, computed in the steps that are logged."""

    def on_run_start(self, run: Run) -> None:
        run.measures_norm = True
        run.gauges["grad_norm"] = lambda: run.grad_norm
