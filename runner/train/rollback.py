"""Going back to the last good checkpoint within a run (nan=rollback), and passing over the samples of a step."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from runner import distributed
from runner.checkpoint import Checkpointer
from runner.errors import RunnerError, TrainingStopped
from runner.train.not_finite import GoBack, record, samples_in_words
from runner.train.run import Run

_log = logging.getLogger("runner")


def roll_back(run: Run, why: GoBack) -> None:
    """Puts everything back to the last good checkpoint, in place; what is recorded after it is dropped.

    Model, optimizer, schedule, loss scale, hooks, the place in the data and random states are those of the
    checkpoint. The step that was bad is from now on made without its samples: the journal says so, and so do later
    checkpoints, so that a run that is interrupted repeats it. Time goes on. No checkpoint may be in flight.

    Raises TrainingStopped where there is no checkpoint to go back to, or only one that lacks the state of a hook.
    """
    assert run.checkpointer is not None
    run.unsettled = None
    run.engine.backend.discard()
    path, lacking = distributed.broadcast(_last(run) if distributed.rank() == 0 else None)
    if path is None:
        raise TrainingStopped(f"step {why.found}: {why.what}; there is no checkpoint to go back to ({lacking})")
    progress = run.progress
    reached, seconds = progress.step, progress.seconds
    back_to = int(path.name.rpartition("_")[2])
    bad = why.bad if why.bad > back_to and why.bad not in progress.passed_over else why.found
    if bad <= back_to or bad in progress.passed_over:
        raise TrainingStopped(f"step {why.found}: {why.what}; going back to {path} does not mend it")
    record(run, bad, why.found, **why.numbers, back_to=back_to)
    _log.warning(
        "step %d: %s; back from step %d to %s, to pass over step %d. %s",
        why.found,
        why.what,
        reached,
        path,
        bad,
        samples_in_words(run, bad),
    )
    passed_over = progress.passed_over | {bad}
    run.checkpointer.load(path, convert=True)
    if left := hooks_lacked(run.checkpointer):
        # One of this process has all; it is damaged or gone, and an older one would leave these at the later step.
        lacks = f"{path}, the last good checkpoint, has no state of {', '.join(left)}: all cannot be put back to it"
        raise TrainingStopped(f"step {why.found}: {why.what}; {lacks}")
    progress.passed_over |= passed_over
    progress.start_clock(seconds)
    run.saved_at = progress.step
    run.trackers.restart(run.folder.path, progress.step, run.config)
    _forget(run)
    run.engine.model.train()
    run.folder.state("running", step=progress.step)


def hooks_lacked(saver: Checkpointer) -> list[str]:
    """The hooks whose state was not in the checkpoint that was loaded last: that does not put them back."""
    return [name for name in saver.lacked if name.startswith("hooks.")]


def _forget(run: Run) -> None:
    """What the steps that are no more have left in the run: records, and what hooks asked for."""
    run.record = {}
    run.take_logged()
    run.progress.stop_reason = None  # also one of the checkpoint: it was gone on from
    run.evaluation_asked = run.saving_asked = run.save_told = False
    run.last_save = time.monotonic()


def _last(run: Run) -> tuple[Path | None, str]:
    """The last good checkpoint; else why there is none."""
    assert run.checkpointer is not None
    try:
        return run.checkpointer.latest(), "none was saved"
    except (RunnerError, OSError) as error:
        return None, str(error)


def pass_over(run: Run) -> None:
    """Makes the step without its samples: nothing is trained, and it counts as one that changed no weight."""
    run.loss, run.grad_norm = torch.full((), torch.nan, device=run.engine.device), None
    run.lr = run.engine.optimizer.param_groups[0]["lr"]
    run.progress.skipped += 1
    run.progress.in_a_row += 1
