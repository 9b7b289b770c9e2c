"""Records the learning rate."""

from __future__ import annotations

from runner.train.hook import Hook
from runner.train.run import Run


class LearningRate(Hook):
    """`lr`, the learning rate of the step's update in the optimizer's first parameter group."""

    def on_run_start(self, run: Run) -> None:
        run.gauges["lr"] = lambda: run.lr
