"""The micro-batches of each optimizer step, with the weight of the whole step over all processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from runner.train.run import Run


class Feed:
    """Walks over the steps of a run.

    A step's weight (samples, or tokens) over all processes must be known before its first backward. So with several
    processes a step's batches are fetched while the step before is still to be made, and their weight rides in that
    step's exchange. One process fetches them when their turn comes.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._step = run.progress.step
        self._steps = run.train_data.steps(self._step, run.plan.steps)
        #: Whether the data set may draw from torch's generator when a step is fetched.
        self._draws = run.train_data.draws
        self._early = run.engine.mesh.data_size > 1
        self._next: Any = None
        self._error: BaseException | None = None
        #: The weight of the present step over all processes: a number, or a 0-d tensor on the device.
        self.weight: Any = None

    def __iter__(self) -> Iterator[Any]:
        first = True
        while True:
            batches = self._next if self._early and not first else self._fetch()
            if self._error is not None:
                raise self._error
            if batches is None:
                return
            if not self._early:
                self.weight = self._weigh(batches)
            elif first:
                self.weight = self._run.engine.total(self._weigh(batches))
            first = False
            yield batches

    def ahead(self) -> Any:
        """This process's weight of the step to come, 0 where none is or nobody needs to know."""
        if not self._early:
            return 0
        try:
            self._next = self._fetch()
            return 0 if self._next is None else self._weigh(self._next)
        except Exception as error:
            # Told when the step's turn comes: the present one is to be finished.
            self._error = error
            return 0

    def _fetch(self) -> Any:
        if self._draws:
            # From numbers of its own, whenever it is asked.
            self._run.engine.seed(self._run.settings.seed, self._step, "data")
        self._step += 1
        return next(self._steps, None)

    def _weigh(self, step: Any) -> Any:
        weight = self._run.task.weight
        if step.real == 1:
            return weight(step.batches[0])
        return sum(weight(batch) for batch in step.batches[: step.real])
