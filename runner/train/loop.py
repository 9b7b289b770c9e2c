"""The training loop, one function."""

from __future__ import annotations

import time
from typing import Any

from runner.train.evaluate import evaluate
from runner.train.feed import Feed
from runner.train.run import Run
from runner.train.step import forward_backward, settle, update


def train(run: Run) -> None:
    """Trains from where the run stands to the end of its plan.

        on_run_start
        for each global step:
            on_epoch_start, where it is the first of an epoch
            on_step_start
            forward and backward of its micro-batches
            on_gradients_ready
            optimizer step, scheduler step; progress
            on_step_end
            on_epoch_end, where it is the last of an epoch
            evaluation, where a hook asked for one        -> on_eval_end
            checkpoint, where one is due                  -> on_checkpoint_saved
        evaluation and checkpoint, where the last step had none
        on_run_end

    An error is shown to the hooks (on_exception) and goes on. A signal or run.stop() ends the loop after the step.
    """
    events, plan, progress, settings = run.events, run.plan, run.progress, run.settings
    seed, every = settings.seed, settings.log_every
    run.first_step = first = saved = progress.step
    run.last_save = time.monotonic()
    try:
        _fire(run, "on_run_start")
        # Looked up only now: a hook may have added itself to a row at the start.
        step_start, gradients_ready, step_end = (
            events["on_step_start"],
            events["on_gradients_ready"],
            events["on_step_end"],
        )
        run.engine.model.train()
        progress.start_clock()
        if progress.owes_evaluation:
            evaluate_now(run)
        if run.fits:
            from runner.train.fit import fit_micro_size

            run.fit = fit_micro_size(run)
        feed = Feed(run)
        for batches in feed:
            step = progress.step
            run.engine.seed(seed, step)
            if plan.starts_epoch(step) or step == first:
                _fire(run, "on_epoch_start", plan.epoch(step))
            run.logging = (step + 1) % every == 0 or step + 1 == plan.steps
            for call in step_start:
                call(run)
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
            if run.evaluation_asked:
                evaluate_now(run)
            # The checkpoint of the last step comes after the last evaluation, and has its metrics.
            if run.stop_reason or run.ending or step + 1 == plan.steps:
                break
            if run.saving_asked or _save_due(run):
                save_now(run)
                saved = step + 1
                if run.stop_reason or run.ending:
                    break
        settle(run)
        _finish(run, saved)
    except BaseException as error:
        for call in events["on_exception"]:
            call(run, error)
        raise


def _finish(run: Run, saved: int) -> None:
    """The last evaluation and checkpoint, where the last step had none; a signal leaves no time to evaluate."""
    step = run.progress.step
    if not run.evaluated and run.ending is None:
        evaluate_now(run)
    if saved != step or run.saving_asked:
        save_now(run)
    _fire(run, "on_run_end")


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
    run.metrics = {"split": "eval", "step": run.progress.step, **metrics}
    run.trackers.log(run.metrics)
    run.schedule.evaluated(metrics)
    if run.checkpointer is not None and run.checkpointer.improves(metrics):
        run.save_soon()
    _fire(run, "on_eval_end", metrics)


def save_now(run: Run) -> None:
    """Saves a checkpoint of this step and tells the hooks."""
    run.saving_asked = False
    settle(run)
    if run.checkpointer is None:
        return
    started = time.perf_counter()
    run.folder.state("saving", step=run.progress.step)
    fresh = run.metrics.get("step") == run.progress.step
    path = run.checkpointer.save(
        run.progress.step,
        {"config": dict(run.config), "setting": run.setting},
        metrics={k: v for k, v in run.metrics.items() if k not in ("split", "step", "samples")} if fresh else None,
    )
    run.paused_seconds += time.perf_counter() - started
    run.last_save, run.save_told = time.monotonic(), False
    run.folder.state("running", step=run.progress.step)
    _fire(run, "on_checkpoint_saved", path)


def _save_due(run: Run) -> bool:
    """Whether a checkpoint is due. By the clock, several processes agree on it in their exchange."""
    due = run.save_every
    by_steps = due.steps is not None and run.progress.step % due.steps == 0
    return by_steps or (run.engine.mesh.data_size == 1 and due.passed(run.last_save))


def _fire(run: Run, event: str, *about: Any) -> None:
    for call in run.events[event]:
        call(run, *about)
