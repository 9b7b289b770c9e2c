"""The loop: its events in order, what hooks may ask for, and when it evaluates and saves."""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small import run as make_run
from torch import nn

from runner.checkpoint import store
from runner.hooks.evaluation import Evaluation
from runner.train import loop
from runner.train.hook import EVENTS, Hook
from runner.train.loop import train
from runner.train.run import Run, SaveEvery

pytestmark = pytest.mark.usefixtures("quiet")


class Told(Hook):
    """Writes down every event, with the step that it was told at."""

    def __init__(self, **at: Callable[[Run], Any]) -> None:
        self.events: list[str] = []
        self._at = at

    def _note(self, event: str, run: Run, *about: Any) -> None:
        self.events.append(" ".join([event, *map(str, about), f"@{run.progress.step}"]))
        if event in self._at:
            self._at[event](run)

    def on_run_start(self, run: Run) -> None:
        self._note("run_start", run)

    def on_epoch_start(self, run: Run, epoch: int) -> None:
        self._note("epoch_start", run, epoch)

    def on_step_start(self, run: Run) -> None:
        self._note("step_start", run)

    def on_gradients_ready(self, run: Run) -> None:
        self._note("gradients_ready", run)

    def on_step_end(self, run: Run) -> None:
        self._note("step_end", run)

    def on_eval_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        self._note("eval_end", run)

    def on_epoch_end(self, run: Run, epoch: int) -> None:
        self._note("epoch_end", run, epoch)

    def on_checkpoint_saved(self, run: Run, path: Path) -> None:
        self._note("checkpoint_saved", run, path.name)

    def on_run_end(self, run: Run) -> None:
        self._note("run_end", run)

    def on_exception(self, run: Run, error: BaseException) -> None:
        self._note("exception", run, type(error).__name__)


def told(folder: Path, **parts: Any) -> list[str]:
    """The events of a run with `at` as the hook's actions."""
    hook = Told(**parts.pop("at", {}))
    train(make_run(folder, hooks={**parts.pop("hooks", {}), "told": hook}, **parts))
    return hook.events


def test_all_events_come_in_the_order_of_the_docstring(tmp_path: Path) -> None:
    # 20 samples, 8 a step: epochs of 3 steps; 5 steps, evaluated each epoch, saved every 2.
    events = told(
        tmp_path, samples=20, steps=5, save=True, save_every=SaveEvery(steps=2), hooks={"evaluation": Evaluation()}
    )
    step = ["step_start @{0}", "gradients_ready @{0}", "step_end @{1}"]

    def of(number: int) -> list[str]:
        return [line.format(number - 1, number) for line in step]

    assert events == [
        "run_start @0",
        "epoch_start 0 @0",
        *of(1),
        *of(2),
        "checkpoint_saved step_00000002 @2",
        *of(3),
        "epoch_end 0 @3",
        "eval_end @3",
        "epoch_start 1 @3",
        *of(4),
        "checkpoint_saved step_00000004 @4",
        *of(5),
        "eval_end @5",
        "checkpoint_saved step_00000005 @5",
        "run_end @5",
    ]


def test_the_list_of_events_is_the_ten() -> None:
    assert len(EVENTS) == 10
    assert {f"on_{name}" for name in re.findall(r"_note\(\"(\w+)\"", Path(__file__).read_text())} == set(EVENTS)


def test_an_exception_is_shown_to_all_hooks_and_goes_on(tmp_path: Path) -> None:
    def fail(run: Run) -> None:
        raise KeyError("mine")

    hook, other = Told(step_start=fail), Told()
    with pytest.raises(KeyError, match="mine"):
        train(make_run(tmp_path, hooks={"a": hook, "b": other}))
    assert hook.events == ["run_start @0", "epoch_start 0 @0", "step_start @0", "exception KeyError @0"]
    assert other.events == ["run_start @0", "epoch_start 0 @0", "exception KeyError @0"]


@pytest.mark.parametrize("also", [KeyError("another"), SystemExit("another")])
def test_a_hook_that_fails_when_told_of_an_error_hides_it_from_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, also: BaseException
) -> None:
    def fail(run: Run) -> None:
        raise ValueError("the true cause")

    def fail_too(run: Run) -> None:
        raise also

    hooks = {"a": Told(step_end=fail), "bad": Told(exception=fail_too), "c": Told()}
    run = make_run(tmp_path, hooks=hooks)
    with caplog.at_level(logging.WARNING, "runner"), pytest.raises(ValueError, match="the true cause"):
        train(run)
    assert [hook.events[-1] for hook in hooks.values()] == ["exception ValueError @1"] * 3
    (warning,) = [record.message for record in caplog.records]
    assert warning.startswith("hooks.bad.on_exception failed as well, while an error was shown to it: ")
    assert type(also).__name__ in warning


def test_a_checkpoint_that_is_told_of_after_an_error_does_not_hide_it(tmp_path: Path) -> None:
    def fail(run: Run) -> None:
        if run.progress.step == 3:
            raise ValueError("the true cause")

    def fail_too(run: Run) -> None:
        if run.progress.step == 3:
            raise KeyError("another")

    hook, settings = Told(checkpoint_saved=fail_too, step_end=fail), {"saves_async": True}
    run = make_run(tmp_path, hooks={"a": hook}, save=True, save_every=SaveEvery(steps=2), settings=settings)
    # It counts as written only once it is waited for.
    assert run.checkpointer is not None
    run.checkpointer.poll = list  # type: ignore[method-assign,assignment]
    with pytest.raises(ValueError, match="the true cause"):
        train(run)
    assert hook.events[-2:] == ["checkpoint_saved step_00000002 @3", "exception ValueError @3"]


def test_a_finished_run_has_not_failed_where_older_checkpoints_cannot_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train(make_run(tmp_path, steps=2, save=True))
    run = make_run(tmp_path, steps=2, save=True)
    assert run.checkpointer is not None
    run.checkpointer.load(tmp_path / "checkpoints" / "step_00000002")

    def broken(folder: Path) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store, "candidates", broken)
    train(run)
    assert "older checkpoints could not be looked at: Input/output error" in caplog.text


def test_evaluation_comes_before_the_checkpoint_also_in_the_last_step(tmp_path: Path) -> None:
    # What is saved for the last step then holds its metrics, and the state of hooks that saw them.
    events = told(tmp_path, samples=24, steps=4, save=True, save_every=SaveEvery(steps=4))
    assert events[-3:] == ["eval_end @4", "checkpoint_saved step_00000004 @4", "run_end @4"]
    assert sum("checkpoint_saved" in event for event in events) == 1


def test_hooks_that_ask_in_time_for_events_at_the_start_get_them(tmp_path: Path) -> None:
    seen: list[int] = []

    class Late(Hook):
        def on_run_start(self, run: Run) -> None:
            run.events["on_gradients_ready"] += (lambda run: seen.append(run.progress.step),)

    train(make_run(tmp_path, steps=2, hooks={"late": Late()}))
    assert seen == [0, 1]


def test_an_event_that_nobody_implements_calls_nothing(tmp_path: Path) -> None:
    class Plain(Hook):
        def on_step_end(self, run: Run) -> None: ...

    run = make_run(tmp_path, hooks={"plain": Plain(), "bare": Hook()})
    assert {event: len(row) for event, row in run.events.items()} == {
        event: int(event == "on_step_end") for event in EVENTS
    }


def test_gradients_are_unscaled_early_only_for_a_hook_that_looks_at_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for hooks in ({}, {"told": Told()}):
        run = make_run(tmp_path, steps=1, hooks=hooks)
        monkeypatch.setattr(run.engine, "unscale", lambda: calls.append("unscale"))
        train(run)
        assert len(calls) == len(hooks)


def test_stop_ends_after_the_step_with_evaluation_and_checkpoint(tmp_path: Path) -> None:
    events = told(
        tmp_path, steps=6, save=True, at={"step_start": lambda run: run.stop("why") if run.progress.step == 1 else None}
    )
    assert events[-4:] == ["step_end @2", "eval_end @2", "checkpoint_saved step_00000002 @2", "run_end @2"]


def test_the_first_reason_to_stop_stays(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.stop("first")
    run.stop("second")
    assert run.stop_reason == "first"


def test_a_signal_ends_after_the_step_with_a_checkpoint_and_no_evaluation(tmp_path: Path) -> None:
    def interrupt(run: Run) -> None:
        run.signal = signal.SIGTERM

    events = told(tmp_path, steps=6, save=True, at={"gradients_ready": interrupt})
    assert events[-3:] == ["step_end @1", "checkpoint_saved step_00000001 @1", "run_end @1"]


def test_evaluate_soon_and_save_soon_act_once_after_the_step(tmp_path: Path) -> None:
    def ask(run: Run) -> None:
        if run.progress.step == 2:
            run.evaluate_soon()
            run.evaluate_soon()
            run.save_soon()

    events = told(tmp_path, steps=4, samples=80, save=True, at={"step_end": ask})
    at = events.index("step_end @2")
    assert events[at + 1 : at + 4] == ["eval_end @2", "checkpoint_saved step_00000002 @2", "step_start @2"]
    assert sum("eval_end" in event for event in events) == 2


def test_seconds_between_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 7))
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    events = told(tmp_path, steps=4, samples=80, save=True, save_every=SaveEvery(seconds=10))
    saved = [event.rpartition("@")[2] for event in events if "checkpoint_saved" in event]
    assert saved[0] == "2"
    assert saved[-1] == "4"


def test_no_evaluation_data_and_no_checkpoints(tmp_path: Path) -> None:
    events = told(tmp_path, steps=1, eval_set=None, at={"step_end": lambda run: (run.evaluate_soon(), run.save_soon())})
    assert events[-2:] == ["step_end @1", "run_end @1"]


def test_a_run_that_goes_on_in_an_epoch_starts_with_that_epoch(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=5, samples=24, eval_set=None)
    run.progress.step = 4
    hook = Told()
    run.events.update({"on_epoch_start": (hook.on_epoch_start,), "on_epoch_end": (hook.on_epoch_end,)})
    train(run)
    assert hook.events == ["epoch_start 1 @4"]


def test_evaluation_leaves_the_model_in_training_mode_and_dropout_to_the_step(tmp_path: Path) -> None:
    modes: list[bool] = []

    class Net(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            modes.append(self.training)
            return super().forward(x)

    train(make_run(tmp_path, steps=2, model=lambda: Net(8, 3), hooks={"evaluation": Evaluation(1)}))
    assert modes == [True, False, False, True, False, False]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_evaluation_changes_no_random_number_of_the_training(tmp_path: Path, every: int) -> None:
    from small import mlp

    def losses(hooks: dict[str, Hook]) -> list[float]:
        found: list[float] = []

        class Keep(Hook):
            def on_step_end(self, run: Run) -> None:
                assert run.loss is not None
                found.append(run.loss.item())

        train(make_run(tmp_path, steps=6, model=lambda: mlp(0.5), hooks={**hooks, "keep": Keep()}))
        return found

    assert losses({"evaluation": Evaluation(every)}) == losses({})
