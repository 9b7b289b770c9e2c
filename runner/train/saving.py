"""Checkpoints of a run: written at once or in the background, told of when complete, and what follows a failure."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from runner.checkpoint import SaveFailed
from runner.errors import RunnerError, TrainingStopped
from runner.heartbeat import SAVING
from runner.train.not_finite import check_weights, last_good
from runner.train.run import Run
from runner.train.step import settle

_log = logging.getLogger("runner")

#: Seconds for a checkpoint that is being written when one of several processes fails.
_MOMENT = 3.0


def save(run: Run, *, last: bool = False) -> list[Path]:
    """Saves a checkpoint of this step, in the background where that is wanted, unless it is the `last`.

    None may be in flight. Returns the checkpoint if it is complete now. Raises TrainingStopped where it cannot be
    written and that is not to be borne, and as `settle` and `check_weights` do.
    """
    run.saving_asked = False
    settle(run)
    if run.checkpointer is None:
        return []
    step, started = run.progress.step, time.perf_counter()
    run.folder.state("saving", step=step)
    run.heartbeat.beat(SAVING, step)
    found: list[Path] = []
    if check_weights(run, last=last):
        # What a crash leaves of the records must have at least those up to the checkpoint.
        run.trackers.flush()
        try:
            path = run.checkpointer.save(
                step,
                {"config": dict(run.config), "setting": run.setting},
                metrics=_metrics_of_this_step(run),
                wait=last or not run.settings.saves_async,
            )
            run.saved_at, run.in_flight = step, path is None
            run.flags_before_save = run.engine.flags_late
            found = [] if path is None else [path]
        except SaveFailed as error:
            _failed(run, error, last)
    run.paused_seconds += time.perf_counter() - started
    run.last_save, run.save_told = time.monotonic(), False
    run.folder.state("running", step=step)
    return found


def landed(run: Run, *, wait: bool = False, last: bool = False) -> list[Path]:
    """The checkpoints written in the background that all processes know to be complete, each told once.

    With `wait` the one in flight is waited for, by all processes together; `last` says that no other one follows it.
    Raises TrainingStopped where it failed and that is not to be borne.
    """
    if not run.in_flight or run.checkpointer is None:
        return []
    alone, started = run.engine.mesh.data_size == 1, time.perf_counter()
    if not (wait or alone or run.save_ended):
        return []
    if wait:
        run.heartbeat.beat(SAVING, run.progress.step)
    try:
        run.written += run.checkpointer.poll() if alone and not wait else run.checkpointer.finish()
    except SaveFailed as error:
        run.in_flight = run.save_ended = False
        _failed(run, error, last)
    run.paused_seconds += time.perf_counter() - started
    found, run.written = run.written, []
    if found or wait:
        run.in_flight = run.save_ended = False
    return found


def leave(run: Run, error: BaseException) -> list[Path]:
    """As `landed` with `wait`, for the end of a training that has failed already.

    Several processes of which one has failed cannot agree any more; each lets its own part be written, for a moment,
    while the others still live, and nobody is told. Nothing is raised: the error that ends the training is the one to
    be told.
    """
    if run.checkpointer is None:
        return []
    if run.engine.mesh.data_size > 1 and not isinstance(error, TrainingStopped):
        run.checkpointer.close(_MOMENT)
        return []
    try:
        return landed(run, wait=True)
    except RunnerError as also:
        _log.warning("%s", also)
        return []


def _metrics_of_this_step(run: Run) -> dict[str, float] | None:
    """The results of an evaluation at this very step, if there was one."""
    if run.metrics.get("step") != run.progress.step:
        return None
    return {name: value for name, value in run.metrics.items() if name not in ("split", "step", "samples")}


def _failed(run: Run, error: SaveFailed, last: bool) -> None:
    """Raises TrainingStopped, or says that the run goes on. Without its last checkpoint a run has not ended well."""
    good = last_good(run)
    if last or run.settings.on_error == "stop":
        raise TrainingStopped(f"{error}; {good}") from error
    _log.warning("%s; the run goes on, the next checkpoint is tried when it is due, and %s", error, good)
