"""The micro-batches of each optimizer step, with the weight of the whole step over all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from runner.heartbeat import DATA, TRAIN
from runner.signals import Interrupted, patient
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
        self._steps: Any = run.train_data.steps(self._step, run.plan.steps)
        self._early = run.engine.mesh.data_size > 1
        self._next: Any = None
        #: Whether `_next` is there: not in the first step, nor after one that was made without an exchange.
        self._ahead = False
        self._error: BaseException | None = None
        self._beat = run.heartbeat.beat
        #: The weight of the present step over all processes: a number, or a 0-d tensor on the device.
        self.weight: Any = None

    def __iter__(self) -> Iterator[Any]:
        while True:
            ahead, self._ahead = self._ahead, False
            batches = self._next if ahead else self._first()
            if ahead:
                self._beat(TRAIN, self._step)
            if self._error is not None:
                raise self._error
            if batches is None:
                return
            if not self._early:
                self.weight = self._weigh(batches)
            elif not ahead:
                self.weight = self._run.engine.total(self._weigh(batches))
            yield batches

    def close(self) -> None:
        """Ends the reading, and the data workers."""
        self._next = None
        self._steps.close()

    def ahead(self) -> Any:
        """This process's weight of the step to come, 0 where none is or nobody needs to know."""
        if not self._early:
            return 0
        self._ahead, present = True, self._step
        # Where the others hear of a signal a step late, they count on this step's batches.
        wait = patient() if self._run.engine.flags_late else nullcontext()
        try:
            with wait:
                self._next = self._fetch()
            return 0 if self._next is None else self._weigh(self._next)
        except Interrupted:
            self._next = None  # all agree in this step's exchange that it is the last one
            return 0
        except Exception as error:
            # Told when the step's turn comes: the present one is to be finished.
            self._error = error
            return 0
        finally:
            self._beat(TRAIN, present)

    def _first(self) -> Any:
        """A step's batches when its turn comes; None, on all processes, where a signal ended the wait of one."""
        try:
            batches = self._fetch()
        except Interrupted:
            batches = None
        # Nothing else tells the other processes, which would wait for this one's weight.
        ended = self._early and self._run.ends_now()
        return None if ended else batches

    def _fetch(self) -> Any:
        self._beat(DATA, self._step + 1)
        self._step += 1
        batches = next(self._steps, None)
        self._beat(TRAIN, self._step)
        return batches

    def _weigh(self, step: Any) -> Any:
        weight = self._run.task.weight
        engine: Any = self._run.engine
        if engine.shards:
            return engine.tally({place: weight(batch) for place, batch in enumerate(step.batches[: step.real])})
        if step.real == 1:
            return weight(step.batches[0])
        return sum(weight(batch) for batch in step.batches[: step.real])
