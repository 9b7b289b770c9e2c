"""The training loop, one function."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner import distributed
from runner.heartbeat import ENDING
from runner.signals import end_workers
from runner.train import saving
from runner.train.evaluate import evaluate
from runner.train.feed import Feed
from runner.train.not_finite import GoBack, look_at_the_start, passed_over
from runner.train.rollback import hooks_lacked, pass_over, roll_back
from runner.train.run import Run
from runner.train.step import forward_backward, settle, update

_log = logging.getLogger("runner")


def train(run: Run) -> None:
    """Trains from where the run stands to the end of its plan.

        on_run_start
        for each global step:
            on_epoch_start, where it is the first of an epoch
            on_step_start
            forward and backward of its micro-batches     (not where a rollback passed over them)
            on_gradients_ready
            optimizer step, scheduler step; progress
            on_step_end
            on_epoch_end, where it is the last of an epoch
            evaluation, where a hook asked for one        -> on_eval_end
            checkpoint, where one is due                  -> on_checkpoint_saved, once it is complete
        evaluation and checkpoint, where the last step had none
        on_run_end

    An error is shown to the hooks (on_exception) and goes on, whatever they raise. A signal or run.stop() ends the loop
    after the step.
    With nan=rollback, what is not finite leads back to the last checkpoint, and on from there.
    """
    try:
        _fire(run, "on_run_start")
        _begin(run)
        while True:
            try:
                _steps(run)
                _finish(run)
                break
            except GoBack as why:
                _tell_saved(run, saving.landed(run, wait=True))
                roll_back(run, why)
        _fire(run, "on_run_end")
    except BaseException as error:
        _show(run, error)
        raise


def _show(run: Run, error: BaseException) -> None:
    """Tells the hooks that the training has failed, after what is saved of it. What they raise is only told.

    So it neither hides the cause nor keeps the other hooks from hearing of it.
    """
    _tell_saved(run, saving.leave(run, error), _fire_guarded)
    _fire_guarded(run, "on_exception", error)


def _fire_guarded(run: Run, event: str, *about: Any) -> None:
    for call in run.events[event]:
        try:
            call(run, *about)
        except (Exception, SystemExit) as also:
            words = f"{type(also).__name__}: {also}"
            _log.warning("%s failed as well, while an error was shown to it: %s", _named(run, call), words)


def _named(run: Run, call: Callable[..., Any]) -> str:
    """What is called, by the hook's name in the configuration; by its own name where it is no hook's method."""
    whose = getattr(call, "__self__", None)
    named = [f"hooks.{name}.{call.__name__}" for name, hook in run.hooks.items() if hook is whose]
    return named[0] if named else getattr(call, "__qualname__", repr(call))


def _begin(run: Run) -> None:
    """What comes before the first step of a process."""
    progress = run.progress
    run.first_step = run.saved_at = progress.step
    run.last_save = time.monotonic()
    run.engine.model.train()
    progress.start_clock()
    look_at_the_start(run)
    progress.passed_over |= passed_over(run)
    if run.fits:
        from runner.train.fit import fit_micro_size

        run.fit = fit_micro_size(run)
    if run.settings.nan == "rollback" and not _can_go_back(run):
        save_now(run)


def _can_go_back(run: Run) -> bool:
    """Whether there is a checkpoint that puts everything back, also hooks that were added only now."""
    saver = run.checkpointer
    found: bool = distributed.broadcast(saver is None or (saver.newest is not None and not hooks_lacked(saver)))
    return found


def _steps(run: Run) -> None:
    """The steps from where the run stands to the last one."""
    events, plan, progress, settings = run.events, run.plan, run.progress, run.settings
    seed, every, first = settings.seed, settings.log_every, progress.step
    # Looked up only now: a hook may have added itself to a row at the start.
    step_start, gradients_ready, step_end = (
        events["on_step_start"],
        events["on_gradients_ready"],
        events["on_step_end"],
    )
    if progress.owes_evaluation:
        evaluate_now(run)
        if run.saving_asked:
            save_now(run)  # again, with its metrics: it is the best now
    if run.stop_reason:
        return  # what ended so, and was killed before it could say so, or what that evaluation has ended
    feed = Feed(run)
    try:
        for batches in feed:
            step = progress.step
            run.engine.seed(seed, step)
            if plan.starts_epoch(step) or step == first:
                _fire(run, "on_epoch_start", plan.epoch(step))
            run.logging = (step + 1) % every == 0 or step + 1 == plan.steps
            for call in step_start:
                call(run)
            if step + 1 in progress.passed_over:
                pass_over(run)
            else:
                share = forward_backward(run, batches, feed.weight)
                if gradients_ready:
                    run.engine.unscale()
                    for call in gradients_ready:
                        call(run)
                update(run, share, feed)
            progress.step = step + 1
            progress.samples = run.train_data.order.samples(step + 1)
            for call in step_end:
                call(run)
            if plan.starts_epoch(step + 1):
                _fire(run, "on_epoch_end", plan.epoch(step))
            if run.in_flight:
                _tell_saved(run, saving.landed(run))
            if run.evaluation_asked:
                evaluate_now(run)
            # The checkpoint of the last step comes after the last evaluation, and has its metrics.
            if run.stop_reason or run.ending or step + 1 == plan.steps:
                break
            if run.saving_asked or _save_due(run):
                save_now(run)
                if run.stop_reason or run.ending:
                    break
    finally:
        if run.ending is not None:
            end_workers()
        feed.close()


def _finish(run: Run) -> None:
    """The last evaluation and checkpoint, where the last step had none; a signal leaves no time to evaluate."""
    settle(run)
    if not run.evaluated and run.ending is None:
        evaluate_now(run)
    if run.saved_at != run.progress.step or run.saving_asked:
        save_now(run, last=True)
    elif run.checkpointer is not None and run.progress.step == run.first_step:
        run.checkpointer.prune()  # who saved this step was killed before that came to it
    _tell_saved(run, saving.landed(run, wait=True, last=True))  # where a signal came while it was being written
    run.heartbeat.beat(ENDING, run.progress.step)


def evaluate_now(run: Run) -> None:
    """Evaluates, records the metrics and tells the hooks."""
    run.evaluation_asked = False
    settle(run)
    if run.eval_data is None:
        run.progress.owes_evaluation = False
        return
    started = time.perf_counter()
    run.folder.state("evaluating", step=run.progress.step)
    # Owed until it is done: what is saved after a signal says so, and the run that goes on begins with it.
    run.progress.owes_evaluation = True
    metrics = evaluate(run)
    if metrics is None:
        return
    run.progress.owes_evaluation = False
    run.paused_seconds += time.perf_counter() - started
    run.folder.state("running", step=run.progress.step)
    run.progress.metrics = {"split": "eval", "step": run.progress.step, **metrics}
    run.trackers.log(run.metrics)
    run.schedule.evaluated(metrics)
    if run.checkpointer is not None and run.checkpointer.improves(metrics):
        run.save_soon()
    _fire(run, "on_eval_end", metrics)


def save_now(run: Run, *, last: bool = False) -> None:
    """Saves a checkpoint of this step; the hooks are told once it is complete."""
    # The one before is told of also where this one turns out not to be saved.
    _tell_saved(run, saving.landed(run, wait=True))
    _tell_saved(run, saving.save(run, last=last))


def _fire(run: Run, event: str, *about: Any) -> None:
    for call in run.events[event]:
        call(run, *about)


def _tell_saved(run: Run, paths: list[Path], fire: Callable[..., None] = _fire) -> None:
    for path in paths:
        fire(run, "on_checkpoint_saved", path)


def _save_due(run: Run) -> bool:
    """Whether a checkpoint is due. By the clock, several processes agree on it in their exchange."""
    due = run.save_every
    by_steps = due.steps is not None and run.progress.step % due.steps == 0
    return by_steps or (run.engine.mesh.data_size == 1 and due.passed(run.last_save))
