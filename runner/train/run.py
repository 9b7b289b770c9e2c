"""The run: what assemble returns and every hook receives."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner import distributed
from runner.checkpoint import Checkpointer
from runner.data.reading import AnyLoader
from runner.engine.backend import Update
from runner.engine.engine import Engine
from runner.folder import RunFolder
from runner.heartbeat import Heartbeat
from runner.train.hook import Events
from runner.train.progress import Plan, Progress
from runner.train.schedules import Schedule
from runner.train.task import Task

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """The numbers of the configuration that the loop itself needs."""

    seed: int = 0
    log_every: int = 10
    grad_clip: float | None = None
    nan: str = "stop"
    #: Whether checkpoints are written while the training goes on.
    saves_async: bool = False
    #: What follows where one cannot be written: `stop` or `continue`.
    on_error: str = "stop"


@dataclass(frozen=True)
class Built:
    """The model as it was built, before a backend wrapped or sharded it: class, parameters, those that are trained."""

    kind: str = "Module"
    parameters: int = 0
    trained: int = 0


@dataclass
class SaveEvery:
    """When a checkpoint is due; the last one is always saved."""

    steps: int | None = None
    seconds: float | None = None

    def passed(self, since: float) -> bool:
        """Whether the seconds between two checkpoints have passed since a time of time.monotonic()."""
        return self.seconds is not None and time.monotonic() - since >= self.seconds


@dataclass
class Run:
    """Everything of one run. Hooks read it; what they may ask for are the methods below."""

    name: str
    config: Mapping[str, Any]
    folder: RunFolder
    engine: Engine
    task: Task
    schedule: Schedule
    train_data: AnyLoader
    eval_data: AnyLoader | None
    plan: Plan
    progress: Progress
    settings: Settings
    hooks: Mapping[str, Any]
    events: Events
    trackers: Any
    checkpointer: Checkpointer | None
    save_every: SaveEvery = field(default_factory=SaveEvery)
    model: Built = Built()  # frozen

    #: Whether the largest micro-batch is to be found before the first step, and what was found.
    fits: bool = False
    fit: Any = None
    #: Mean loss of the last finished step: 0-d, on the device. Reading it as a number waits for the device.
    loss: Tensor | None = None
    #: Global gradient norm of the last finished step before clipping (0-d), or None where it was not computed.
    grad_norm: Tensor | None = None
    #: Whether training records want the gradient norm.
    measures_norm: bool = False
    #: Learning rate (of the first parameter group) of the last finished step.
    lr: float = 0.0
    #: The last update whose outcome the host has not looked at, and its step.
    unsettled: Update | None = None
    unsettled_step: int = 0
    #: Whether the current step gets a training record.
    logging: bool = False
    #: Name -> function whose value joins every training record.
    gauges: dict[str, Callable[[], Any]] = field(default_factory=dict)
    #: Contexts around every evaluation (EMA puts its weights in place).
    evaluation_contexts: list[Callable[[], AbstractContextManager[Any]]] = field(default_factory=list)
    #: The last training record.
    record: Record = field(default_factory=dict)
    #: Tokens of the micro-batches since this process started, where the task counts them.
    tokens: Any = 0
    counts_tokens: bool = False
    #: Seconds of evaluations and checkpoints since this process started.
    paused_seconds: float = 0.0
    #: What the training runs on, as checkpoints tell it: precision, device, versions.
    setting: dict[str, Any] = field(default_factory=dict)
    #: What kind of terminal there is (TERM).
    terminal: str | None = None
    #: Where this process says what it is doing.
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    #: The signal that asked this process for the end, or None.
    signal: int | None = None
    #: The signal that all processes know of, where there are several.
    agreed_signal: int | None = None
    #: When the last checkpoint was saved, by time.monotonic().
    last_save: float = field(default_factory=time.monotonic)
    #: Whether the other processes were told that one is due, and it is not made yet.
    save_told: bool = False
    #: The step of the last checkpoint that was begun, or gone on from.
    saved_at: int = 0
    #: Whether a checkpoint is being written in the background, and whether its end is known to all processes.
    in_flight: bool = False
    save_ended: bool = False
    #: Whether the next exchange gives flags from before the last save began: they tell of the one before that.
    flags_before_save: bool = False
    #: Those that are complete as far as this process knows, and that the hooks were not told of.
    written: list[Path] = field(default_factory=list)
    evaluation_asked: bool = False
    saving_asked: bool = False
    #: Names of buffers that were not finite from the start.
    never_finite: frozenset[str] = frozenset()
    #: What was not finite before this process made a step, in words: `weights or optimizer state`, `hooks.NAME`.
    spoilt_at_start: frozenset[str] = frozenset()
    #: The step (from 0) at which this process began.
    first_step: int = 0
    #: Seconds from the start of the program to the first step.
    startup_seconds: float = 0.0
    _to_log: Record = field(default_factory=dict)

    @property
    def metrics(self) -> Record:
        """The last evaluation's record."""
        return self.progress.metrics

    @property
    def stop_reason(self) -> str | None:
        """Why the training ends before its plan, or None. What ended a shorter one does not end this one."""
        return self.progress.stop_reason if self.progress.stopped_plan >= self.plan.steps else None

    @property
    def evaluated(self) -> bool:
        """Whether there is nothing to evaluate at this step, or it is done."""
        return self.eval_data is None or self.metrics.get("step") == self.progress.step

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do, also where a signal came so late."""
        ended = self.progress.step >= self.plan.steps or self.stop_reason is not None
        return self.ending is None or (ended and self.evaluated)

    @property
    def ending(self) -> int | None:
        """The signal that ends the training: with several processes, once all of them know."""
        return self.signal if self.engine.mesh.data_size == 1 else self.agreed_signal

    @property
    def asked(self) -> tuple[bool, bool]:
        """Whether this process was asked to end: (by SIGTERM, SIGUSR1 or SIGHUP, by SIGINT)."""
        return self.signal not in (None, signal.SIGINT), self.signal == signal.SIGINT

    def agree(
        self, terminated: float, interrupted: float, save: float = 0, failed: float = 0, written: float = 0
    ) -> None:
        """Takes what an exchange of all processes said: how many were asked to end, want to save, could not write
        the checkpoint in flight, have written it.
        """
        self._hear(terminated, interrupted)
        if save:
            self.save_soon()
        of_another, self.flags_before_save = self.flags_before_save, False
        if self.in_flight and not of_another and (failed or written == self.engine.mesh.data_size):
            self.save_ended = True

    def _hear(self, terminated: float, interrupted: float) -> None:
        if terminated or interrupted:
            self.agreed_signal = signal.SIGINT if interrupted else signal.SIGTERM

    def ends_now(self) -> bool:
        """Whether a signal to any process ends the training: asked where there is no exchange, by all together."""
        if self.engine.mesh.data_size > 1:
            terminated, interrupted = distributed.total(torch.tensor(self.asked).int()).tolist()
            self._hear(terminated, interrupted)
        return self.ending is not None

    # Loss, metrics and progress are the same on all processes, so what follows from them alone is asked for by all of
    # them at the same step. What only one process knows must not reach these three.

    def stop(self, why: str) -> None:
        """Ends the training after this step, with an evaluation and a checkpoint; before the first one, without any."""
        if self.stop_reason is None:
            self.progress.stop_reason, self.progress.stopped_plan = why, self.plan.steps

    def evaluate_soon(self) -> None:
        """Evaluates after this step."""
        self.evaluation_asked = True

    def save_soon(self) -> None:
        """Saves a checkpoint after this step."""
        self.saving_asked = True

    def log(self, values: Mapping[str, Any]) -> None:
        """Adds values (numbers or 0-d tensors) to the next training record."""
        self._to_log.update(values)

    def take_logged(self) -> Record:
        """The values that were logged since the last call."""
        values, self._to_log = self._to_log, {}
        return values
