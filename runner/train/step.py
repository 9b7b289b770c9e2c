"""One optimizer step: forward and backward, exact for any split into micro-batches; and the update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runner.errors import wrong
from runner.train.feed import Feed
from runner.train.not_finite import follow
from runner.train.run import Run


def forward_backward(run: Run, step: Any, weight: Any) -> Tensor:
    """Adds up the gradients of a step's micro-batches and returns this process's share of the mean loss (0-d).

    `weight` is the denominator: that of all micro-batches of all processes. Each micro-batch's summed loss is divided
    by it, so any split gives the gradient of the whole. Micro-batches that only fill the step up count nothing.
    """
    engine, task = run.engine, run.task
    if engine.shards:
        return _by_shards(run, engine, step, weight)
    factor = engine.factor(weight)
    last = len(step.batches) - 1
    total: Tensor | None = None
    for i, batch in enumerate(step.batches):
        counts = i < step.real
        if run.counts_tokens and counts:
            run.tokens += task.tokens(batch) or 0
        with engine.accumulate(i == last):
            loss = task.loss(engine.forward(task.inputs(batch)), batch)
            if run.loss is None:
                check_loss(loss, task)
            share = engine.backward(loss, factor if counts else torch.zeros_like(factor))
        if counts:
            total = share if total is None else total + share
    return torch.zeros((), device=engine.device) if total is None else total


def _by_shards(run: Run, engine: Any, step: Any, weight: Any) -> Tensor:
    """The same with determinism=canonical: the gradients are the whole step's, the shares stand at their shards."""
    task, seed, number = run.task, run.settings.seed, run.progress.step
    factor = engine.factor(weight)
    shares: dict[int, Tensor] = {}
    for place in engine.walk(step.real):
        batch = step.batches[place]
        if run.counts_tokens:
            run.tokens += task.tokens(batch) or 0
        engine.seed_shard(seed, number, place)
        loss = task.loss(engine.forward(task.inputs(batch)), batch)
        if run.loss is None:
            check_loss(loss, task)
        shares[place] = engine.backward(loss, factor)
    engine.seed_update(seed, number)
    return engine.tally(shares)


def update(run: Run, share: Tensor, feed: Feed) -> None:
    """Steps the optimizer; `settle` says what became of it. Sets the run's loss, grad_norm and lr of this step."""
    settle(run)
    settings, engine = run.settings, run.engine
    alone = engine.mesh.data_size == 1
    ahead = feed.ahead()  # before the flags: a signal may end the wait for the data
    flags = () if alone else (*run.asked, _save_due(run), *_written(run))
    known = engine.exchange(share, ahead, flags, guard=settings.nan != "ignore")
    if not alone:
        feed.weight = known.weight
        run.agree(*known.flags)
    run.lr = engine.optimizer.param_groups[0]["lr"]
    result = engine.step(settings.grad_clip, skip=known.skip, measure=run.logging and run.measures_norm)
    run.loss, run.grad_norm = known.loss, result.grad_norm
    run.unsettled, run.unsettled_step = result, run.progress.step + 1
    if run.logging or not isinstance(result.skipped, Tensor):
        settle(run)


def _save_due(run: Run) -> bool:
    """Whether the seconds between two checkpoints have passed, by the first process's clock; told once."""
    due = run.engine.mesh.data_rank == 0 and not run.save_told and run.save_every.passed(run.last_save)
    run.save_told = run.save_told or due
    return due


def _written(run: Run) -> tuple[bool, bool]:
    """Whether this process (could not write, has written) the checkpoint that is in flight."""
    if not run.in_flight or run.checkpointer is None:
        return False, False
    run.written += run.checkpointer.poll()
    return run.checkpointer.failed, bool(run.written)


def settle(run: Run) -> None:
    """Moves the schedule after the last update, or follows the policy where that was not finite.

    At once where the host knows; else at the next update, log, evaluation or save, so that nobody waits for a device.
    Raises as `follow` does.
    """
    result, run.unsettled = run.unsettled, None
    if result is None:
        return
    if not bool(result.skipped):
        run.schedule.step()
        run.progress.in_a_row = 0
        return
    if not result.overflow:
        follow(run, result)
    run.progress.skipped += 1
    run.progress.overflows += result.overflow


def check_loss(loss: Any, task: Any) -> None:
    """Raises InputError where a task's loss is not what backward needs."""
    name = type(task).__name__
    if not isinstance(loss, Tensor):
        raise wrong("task", f"{name}.loss returned a {type(loss).__name__}", "return one tensor: the sum of the losses")
    if loss.dim() != 0:
        raise wrong("task", f"{name}.loss has shape {tuple(loss.shape)}", 'return a 0-d sum (reduction="sum")')
    if not loss.requires_grad:
        raise wrong("task", f"{name}.loss is detached from the model", "compute it from the outputs without .item()")
