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
    """Finished optimizer steps, samples passed and seconds trained; of steps, how many changed no weight and why."""

    step: int = 0
    samples: int = 0
    skipped: int = 0
    overflows: int = 0
    #: How many of the last steps, up to this one, changed no weight because something was not finite.
    in_a_row: int = 0
    #: Steps (from 1) that are made without their samples, because these were not finite before a rollback.
    passed_over: set[int] = field(default_factory=set)
    #: The last evaluation's record.
    metrics: dict[str, Any] = field(default_factory=dict)
    #: An evaluation was due at this step and a signal left no time for it.
    owes_evaluation: bool = False
    #: Why the training was ended before its plan, and of how many steps that plan was.
    stop_reason: str | None = None
    stopped_plan: int = 0
    seconds_before: float = 0.0
    _started: float | None = field(default=None, repr=False)

    def start_clock(self, seconds_before: float | None = None) -> None:
        """Counts from here on; what was counted before is `seconds_before`, unless it stays as it is."""
        if seconds_before is not None:
            self.seconds_before = seconds_before
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
            "in_a_row": self.in_a_row,
            "passed_over": sorted(self.passed_over),
            "metrics": dict(self.metrics),
            "owes_evaluation": self.owes_evaluation,
            "stop_reason": self.stop_reason,
            "stopped_plan": self.stopped_plan,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.samples = state["step"], state["samples"]
        self.skipped, self.overflows = state["skipped"], state["overflows"]
        self.in_a_row, self.passed_over = state["in_a_row"], set(state["passed_over"])
        self.metrics = dict(state["metrics"])
        self.owes_evaluation = state["owes_evaluation"]
        # Checkpoints of older versions do not say.
        self.stop_reason, self.stopped_plan = state.get("stop_reason"), state.get("stopped_plan", 0)
        self.seconds_before = state["seconds"]
