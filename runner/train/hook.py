"""Hooks: observers of the loop with some of ten event methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from runner.errors import Problem

if TYPE_CHECKING:
    from pathlib import Path

    from runner.train.run import Run


class Hook:
    """Base of hooks: override the events you need; the others cost nothing.

        on_run_start
        for each epoch:
            on_epoch_start
            for each optimizer step:
                on_step_start
                (forward and backward of the micro-batches)
                on_gradients_ready
                (optimizer step, scheduler step)
                on_step_end
                (evaluation if one is due)              on_eval_end
                (checkpoint if one is due)              on_checkpoint_saved
            on_epoch_end  (before the evaluation and the checkpoint of the last step)
        on_run_end, or on_exception where the run fails

    A hook with state has `state_dict()` and `load_state_dict(state)` (tensors and JSON values); it is then saved in
    checkpoints under its name in the configuration. A rollback (nan=rollback) loads it in the middle of a run.
    """

    def on_run_start(self, run: Run) -> None:
        """Everything is built and resumed; no step has been made."""

    def on_epoch_start(self, run: Run, epoch: int) -> None:
        """Before the first step of an epoch (from 0), or of the rest of one after a resume or a rollback."""

    def on_step_start(self, run: Run) -> None:
        """Before the forward pass; run.progress.step steps are finished."""

    def on_gradients_ready(self, run: Run) -> None:
        """All gradients of the step are there, unscaled and not clipped."""

    def on_step_end(self, run: Run) -> None:
        """The step is finished and counted; run.loss holds its loss."""

    def on_eval_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """After an evaluation."""

    def on_epoch_end(self, run: Run, epoch: int) -> None:
        """After the last step of an epoch (from 0)."""

    def on_checkpoint_saved(self, run: Run, path: Path) -> None:
        """A checkpoint is complete and on disk."""

    def on_run_end(self, run: Run) -> None:
        """The training is over, also where it was stopped or interrupted."""

    def on_exception(self, run: Run, error: BaseException) -> None:
        """The training failed; the error goes on after all hooks were told."""


EVENTS = tuple(name for name in vars(Hook) if name.startswith("on_"))

#: Event name -> the bound methods of the hooks that implement it.
Events = dict[str, tuple[Callable[..., Any], ...]]


def events(hooks: Iterable[Any]) -> Events:
    """The table of what is called when, made once; an event that no hook implements has an empty row."""
    found = list(hooks)
    return {
        event: tuple(
            getattr(hook, event)
            for hook in found
            if getattr(type(hook), event, None) not in (None, getattr(Hook, event))
        )
        for event in EVENTS
    }


def check(name: str, kind: Any) -> list[Problem]:
    """Methods of a hook's class that look like events and are none."""
    problems = []
    for method in dir(kind):
        if method.startswith("on_") and callable(getattr(kind, method)) and method not in EVENTS:
            close = get_close_matches(method, EVENTS, 1)
            problems.append(
                Problem(
                    f"hooks.{name}",
                    f"{kind.__name__}.{method} is named like an event and is none",
                    f"did you mean {close[0]}?" if close else f"events are {', '.join(EVENTS)}",
                )
            )
    return problems
