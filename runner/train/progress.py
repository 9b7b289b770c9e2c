"""How far a run is, and how long it is to be."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Plan:
    """The length of a run: `steps` optimizer steps, `steps_per_epoch` of them an epoch."""

    steps: int
    steps_per_epoch: int

    def epoch(self, step: int) -> int:
        """The epoch (from 0) to which step `step` (from 0) belongs."""
        return step // self.steps_per_epoch

    def starts_epoch(self, step: int) -> bool:
        """Whether step `step` (from 0) is the first of an epoch."""
        return step % self.steps_per_epoch == 0


@dataclass
class Progress:
    """Finished optimizer steps, samples seen and seconds trained; of steps, how many changed no weight and why."""

    step: int = 0
    samples: int = 0
    skipped: int = 0
    overflows: int = 0
    #: An evaluation was due at this step and a signal left no time for it.
    owes_evaluation: bool = False
    seconds_before: float = 0.0
    _started: float | None = field(default=None, repr=False)

    def start_clock(self) -> None:
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training, interruptions left out."""
        return self.seconds_before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "samples": self.samples,
            "skipped": self.skipped,
            "overflows": self.overflows,
            "owes_evaluation": self.owes_evaluation,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.samples = state["step"], state["samples"]
        self.skipped, self.overflows = state["skipped"], state["overflows"]
        self.owes_evaluation = state["owes_evaluation"]
        self.seconds_before = state["seconds"]
