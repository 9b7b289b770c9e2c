"""What goes into a training record: its numbers, the rate, the gradient norm, the speed; and stopping early."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Records
from small import run as make_run
from torch import Tensor

from runner.errors import InputError
from runner.hooks.early_stop import EarlyStop
from runner.hooks.evaluation import Evaluation
from runner.hooks.gradient_norm import GradientNorm
from runner.hooks.learning_rate import LearningRate
from runner.hooks.metrics_log import MetricsLog
from runner.hooks.profiler import Profiler
from runner.hooks.throughput import Throughput
from runner.tasks.classification import Classification
from runner.train import run as run_module
from runner.train.hook import Hook
from runner.train.loop import train
from runner.train.run import Run
from runner.train.schedules import linear

pytestmark = pytest.mark.usefixtures("quiet")


def records(folder: Path, *hooks: Hook, split: str = "train", **parts: Any) -> list[dict[str, Any]]:
    """The records of a run with these hooks and MetricsLog after them."""
    named = {str(i): hook for i, hook in enumerate([*hooks, MetricsLog()])}
    run = make_run(folder, hooks=named, **parts)
    tracker = Records()
    run.trackers._trackers["records"] = tracker
    train(run)
    return [record for record in tracker.found if record["split"] == split]


# --- the record -------------------------------------------------------------------------------------------------------


def test_a_record_has_its_step_its_epoch_and_its_samples(tmp_path: Path) -> None:
    found = records(tmp_path, samples=20, steps=6)
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5, 6]
    assert [record["samples"] for record in found] == [8, 16, 20, 28, 36, 40]
    assert [record["epoch"] for record in found] == [samples / 20 for samples in (8, 16, 20, 28, 36, 40)]
    assert all(isinstance(record["loss"], float) for record in found)
    assert [record["time"] for record in found] == sorted(record["time"] for record in found)
    assert list(found[0])[:5] == ["split", "step", "epoch", "samples", "loss"]


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (10, [5])])
def test_records_come_every_so_often_and_at_the_end(tmp_path: Path, every: int, steps: list[int]) -> None:
    assert [record["step"] for record in records(tmp_path, steps=5, settings={"log_every": every})] == steps


def test_what_others_log_joins_the_next_record(tmp_path: Path) -> None:
    class Logs(Hook):
        def on_step_end(self, run: Run) -> None:
            run.log({"mine": torch.tensor(run.progress.step * 1.5), "plain": 2})

    found = records(tmp_path, Logs(), steps=4, settings={"log_every": 2})
    assert [(record["mine"], record["plain"]) for record in found] == [(3.0, 2), (6.0, 2)]


def test_what_was_logged_once_is_in_one_record(tmp_path: Path) -> None:
    class Once(Hook):
        def on_run_start(self, run: Run) -> None:
            run.log({"mine": 1})

    assert ["mine" in record for record in records(tmp_path, Once(), steps=3)] == [True, False, False]


# --- gauges -----------------------------------------------------------------------------------------------------------


def test_the_rate_is_the_one_that_the_step_used(tmp_path: Path) -> None:
    found = records(tmp_path, LearningRate(), steps=4, scheduler=lambda sgd: linear(sgd, 4))
    assert [record["lr"] for record in found] == pytest.approx([0.1, 0.075, 0.05, 0.025])


@pytest.mark.parametrize("settings", [{}, {"nan": "ignore"}, {"grad_clip": 0.1}, {"nan": "ignore", "grad_clip": 0.1}])
def test_the_gradient_norm_is_the_true_one_before_clipping(tmp_path: Path, settings: dict[str, Any]) -> None:
    class Measure(Hook):
        def __init__(self) -> None:
            self.norms: list[float] = []

        def on_gradients_ready(self, run: Run) -> None:
            gradients = [p.grad.flatten() for p in run.engine.model.parameters() if p.grad is not None]
            self.norms.append(torch.cat(gradients).norm().item())

    measure = Measure()
    found = records(tmp_path, GradientNorm(), measure, steps=4, settings={"log_every": 2, **settings})
    assert [record["grad_norm"] for record in found] == pytest.approx(measure.norms[1::2], rel=1e-6)


def test_the_gradient_norm_without_anybody_else_who_needs_it(tmp_path: Path) -> None:
    """nan=ignore and no clipping: the engine computes none, so the hook does."""
    guarded = records(tmp_path, GradientNorm(), steps=3)
    ignoring = records(tmp_path, GradientNorm(), steps=3, settings={"nan": "ignore"})
    assert [record["grad_norm"] for record in ignoring] == [record["grad_norm"] for record in guarded]


def test_the_gradient_norm_of_fp16_is_unscaled(tmp_path: Path) -> None:
    plain = records(tmp_path, GradientNorm(), steps=2)
    for settings in ({}, {"nan": "ignore"}):
        half = records(tmp_path, GradientNorm(), steps=2, precision="fp16", settings=settings)
        assert half[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-2)


class Clock:
    """A time that stands still unless it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        for place in ("runner.hooks.throughput", "runner.train.loop", "runner.train.progress"):
            monkeypatch.setattr(f"{place}.time.perf_counter", lambda: self.now)


class Takes(Hook):
    """Every step takes two seconds, every evaluation twenty."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_start(self, run: Run) -> None:
        self.clock.now += 2.0


class Slow(Classification):
    clock: Clock

    def metrics(self, outputs: Tensor, batch: Any) -> dict[str, Any]:
        self.clock.now += 10.0
        return {}

    def tokens(self, batch: Any) -> Tensor:
        return torch.tensor(7 * len(batch[0]))


def test_samples_and_tokens_a_second_leave_evaluations_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    task = Slow()
    task.clock = clock
    found = records(
        tmp_path,
        Evaluation(1),
        Takes(clock),
        Throughput(),
        samples=20,
        steps=6,
        settings={"log_every": 3},
        task=task,
        counts_tokens=True,
    )
    # Epochs of 8 + 8 + 4 samples in 3 steps of 2 s.
    assert [record["samples_per_second"] for record in found] == [20 / 6, 20 / 6]
    assert [record["tokens_per_second"] for record in found] == [140 / 6, 140 / 6]


def test_no_tokens_where_the_task_counts_none(tmp_path: Path) -> None:
    (record,) = records(tmp_path, Throughput(), steps=1)
    assert record["samples_per_second"] > 0
    assert "tokens_per_second" not in record


# --- evaluation, early stop -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "at"), [(None, [3, 6, 7]), (2, [2, 4, 6, 7]), (7, [7]), (100, [7])])
def test_evaluations_every_epoch_or_so_many_steps_and_at_the_end(
    tmp_path: Path, every: int | None, at: list[int]
) -> None:
    found = records(tmp_path, Evaluation(every), steps=7, split="eval")
    assert [record["step"] for record in found] == at


def evaluated(hook: EarlyStop, values: list[float]) -> str | None:
    class Stops:
        reason: str | None = None

        def stop(self, why: str) -> None:
            self.reason = why

    run: Any = Stops()
    for value in values:
        hook.on_eval_end(run, {"samples": 5, "loss": value, "accuracy": value})
    return run.reason


@pytest.mark.parametrize(
    ("options", "values", "stops"),
    [
        ({}, [3, 2, 2, 2], False),
        ({}, [3, 2, 2, 2, 2], True),
        ({}, [3, 2, 2.5, 2.5, 1, 1, 1], False),
        ({"patience": 1}, [1, 1], True),
        ({"patience": 1, "metric": "accuracy", "mode": "max"}, [0.1, 0.2, 0.3], False),
        ({"patience": 1, "metric": "accuracy", "mode": "max"}, [0.1, 0.2, 0.2], True),
        ({"patience": 1, "min_delta": 0.5}, [3, 2.6], True),
        ({"patience": 1, "min_delta": 0.5}, [3, 2.4], False),
        ({"patience": 2}, [math.nan, math.nan, math.nan], True),
    ],
)
def test_early_stop(options: dict[str, Any], values: list[float], stops: bool) -> None:
    assert (evaluated(EarlyStop(**options), values) is not None) is stops


def test_early_stop_after_an_evaluation_that_was_no_number() -> None:
    """A first value that is not a number is no best: what comes after it is better."""
    assert evaluated(EarlyStop(patience=2), [math.nan, 3.0, 2.0, 1.0, 0.5]) is None


def test_early_stop_says_why() -> None:
    why = evaluated(EarlyStop(patience=2), [0.123456789, 1, 1])
    assert why == "loss has been not better than 0.123457 for 2 evaluations (early_stop)"
    why = evaluated(EarlyStop(patience=2), [math.nan] * 2)
    assert why == "loss has been not a number for 2 evaluations (early_stop)"


def test_early_stop_goes_on_counting_after_a_resume() -> None:
    first, second = EarlyStop(patience=3), EarlyStop(patience=3)
    evaluated(first, [1.0, 2.0, 2.0])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert evaluated(second, [2.0]) is not None


def test_early_stop_ends_a_run(tmp_path: Path) -> None:
    found = records(tmp_path, Evaluation(1), EarlyStop(patience=2, min_delta=1e9), steps=20, samples=200, split="eval")
    assert [record["step"] for record in found] == [1, 2, 3]


def test_early_stop_names_the_metrics_that_there_are() -> None:
    with pytest.raises(InputError) as caught:
        evaluated(EarlyStop(metric="f1"), [1.0])
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == ("hooks.early_stop.metric", "f1")
    assert problem.fix == "choose of loss, accuracy"


@pytest.mark.parametrize(("options", "key"), [({"mode": "best"}, "mode"), ({"patience": 0}, "patience")])
def test_early_stop_options(options: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as caught:
        EarlyStop(**options)
    assert caught.value.problems[0].key == f"hooks.early_stop.{key}"


# --- the profiler -----------------------------------------------------------------------------------------------------


def test_the_profiler_writes_a_trace_and_a_table(tmp_path: Path) -> None:
    train(make_run(tmp_path, hooks={"profiler": Profiler(2, 3, rows=5)}, steps=4))
    trace = json.loads((tmp_path / "profile" / "steps_2_3.json").read_text())
    assert sum(event.get("name") == "aten::linear" for event in trace["traceEvents"]) == 4  # two layers, two steps
    table = (tmp_path / "profile" / "steps_2_3.txt").read_text()
    assert "Self CPU" in table
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["steps_2_3.json", "steps_2_3.txt"]


def test_the_profiler_writes_what_it_has_when_the_run_ends_earlier(tmp_path: Path) -> None:
    train(make_run(tmp_path, hooks={"profiler": Profiler(1, 100)}, steps=1))
    assert (tmp_path / "profile" / "steps_1_100.json").exists()


def test_the_profiler_writes_what_it_has_when_the_run_fails(tmp_path: Path) -> None:
    from small import Crash

    with pytest.raises(RuntimeError, match="on purpose"):
        train(make_run(tmp_path, hooks={"profiler": Profiler(1, 100), "crash": Crash(1)}, steps=1))
    assert (tmp_path / "profile" / "steps_1_100.json").exists()


def test_a_profiler_that_never_comes_writes_nothing(tmp_path: Path) -> None:
    train(make_run(tmp_path, hooks={"profiler": Profiler(50, 60)}, steps=1))
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(("first", "last"), [(0, 1), (3, 2), (-1, -1)])
def test_profiler_options(first: int, last: int) -> None:
    with pytest.raises(InputError, match="1 <= first <= last"):
        Profiler(first, last)


def test_a_run_takes_what_was_logged_once(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.log({"a": 1})
    run.log({"b": 2})
    assert run.take_logged() == {"a": 1, "b": 2}
    assert run.take_logged() == {}
    assert run_module.Settings().nan == "stop"
