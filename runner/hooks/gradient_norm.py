"""Records the gradient norm."""

from __future__ import annotations

from torch import Tensor

from runner.engine.gradients import global_norm
from runner.train.hook import Hook
from runner.train.run import Run


class GradientNorm(Hook):
    """`grad_norm`, the global 2-norm of the true gradient before clipping.

    The engine computes it in every step to guard against NaN; only with nan=ignore and no clipping it is computed
    here, in the steps that are logged.
    """

    def on_run_start(self, run: Run) -> None:
        run.gauges["grad_norm"] = lambda: run.grad_norm if run.grad_norm is not None else self._norm
        self._norm: Tensor | None = None
        settings = run.settings
        if settings.nan == "ignore" and settings.grad_clip is None:
            run.gauges["grad_norm"] = lambda: self._norm
            run.events["on_gradients_ready"] += (self._measure,)

    def _measure(self, run: Run) -> None:
        if run.logging:
            parameters = (p for group in run.engine.optimizer.param_groups for p in group["params"])
            self._norm = global_norm([p.grad for p in parameters if p.grad is not None])
