"""Asks for evaluations."""

from __future__ import annotations

from runner.train.hook import Hook
from runner.train.run import Run


class Evaluation(Hook):
    """Evaluates every `steps` optimizer steps, or where `steps` is None after every epoch.

    Made from eval.every, under the name `evaluation`.
    """

    def __init__(self, steps: int | None = None) -> None:
        self._steps = steps

    def on_step_end(self, run: Run) -> None:
        if self._steps is not None and run.progress.step % self._steps == 0:
            run.evaluate_soon()

    def on_epoch_end(self, run: Run, epoch: int) -> None:
        if self._steps is None:
            run.evaluate_soon()
