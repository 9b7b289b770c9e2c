"""Schedules: exact values, what moves them, and going on from a checkpoint with any of torch's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import run as make_run
from torch import nn
from torch.optim import SGD, Optimizer, lr_scheduler

from runner.engine.model_state import OptimizerState
from runner.errors import InputError
from runner.hooks.evaluation import Evaluation
from runner.train.loop import train
from runner.train.schedules import Schedule, constant, cosine, linear

pytestmark = pytest.mark.usefixtures("quiet")


def optimizer(rate: float = 1.0) -> Optimizer:
    return SGD(nn.Linear(2, 2).parameters(), lr=rate, momentum=0.9)


def rates(make: Callable[[Optimizer], Any], steps: int, rate: float = 1.0) -> list[float]:
    """The rate of each step, and the one after the last."""
    sgd = optimizer(rate)
    schedule = Schedule(make(sgd))
    found = [sgd.param_groups[0]["lr"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(steps):
            sgd.step()
            schedule.step()
            found.append(sgd.param_groups[0]["lr"])
    return found


def test_linear_without_warmup() -> None:
    assert rates(lambda sgd: linear(sgd, 4), 4) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_linear_with_warmup_rises_to_the_rate_and_falls_to_final() -> None:
    found = rates(lambda sgd: linear(sgd, 10, warmup=3, final=0.1), 10, rate=2.0)
    expected = [2 * (i + 1) / 4 for i in range(3)] + [2 * (1 - 0.9 * i / 7) for i in range(8)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[3] == 2.0
    assert found[10] == pytest.approx(0.2)


@pytest.mark.parametrize(("warmup", "steps"), [(0.2, 2), (2, 2), (0.25, 2), (1, 1), (0.99, 10)])
def test_warmup_is_a_fraction_below_one_and_steps_from_one(warmup: float, steps: int) -> None:
    found = rates(lambda sgd: constant(sgd, 10, warmup=warmup), 10)
    assert found == pytest.approx([(i + 1) / (steps + 1) for i in range(steps)] + [1.0] * (11 - steps))


def test_cosine_values() -> None:
    found = rates(lambda sgd: cosine(sgd, 12, warmup=2, final=0.2), 12)
    expected = [1 / 3, 2 / 3] + [0.2 + 0.8 * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(11)]
    assert found == pytest.approx(expected, rel=1e-12)


def test_cosine_without_warmup_is_torchs() -> None:
    ours = rates(lambda sgd: cosine(sgd, 20), 20)
    torchs = rates(lambda sgd: lr_scheduler.CosineAnnealingLR(sgd, 20), 20)
    assert ours == pytest.approx(torchs, rel=1e-9, abs=1e-12)


def test_the_rate_stays_at_the_end_after_the_end() -> None:
    assert rates(lambda sgd: linear(sgd, 2, final=0.5), 4) == [1.0, 0.75, 0.5, 0.5, 0.5]


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        linear(optimizer(), 10, warmup=11)
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == ("scheduler.warmup", 11)
    assert "11 steps is longer than the run of 10" in problem.why
    assert rates(lambda sgd: linear(sgd, 4, warmup=4), 4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_no_scheduler_does_nothing() -> None:
    schedule = Schedule(None)
    schedule.step()
    schedule.evaluated({})
    assert schedule.state_dict() == {}
    schedule.load_state_dict({})


# --- a metric ---------------------------------------------------------------------------------------------------------


def plateau(sgd: Optimizer, **options: Any) -> lr_scheduler.ReduceLROnPlateau:
    return lr_scheduler.ReduceLROnPlateau(sgd, factor=0.5, **{"patience": 1, **options})


def test_a_plateau_counts_evaluations_and_not_steps() -> None:
    sgd = optimizer()
    schedule = Schedule(plateau(sgd))
    for loss, rate in [(1.0, 1.0), (1.0, 1.0), (1.0, 0.5), (0.5, 0.5), (0.6, 0.5), (0.6, 0.25)]:
        for _ in range(10):
            schedule.step()
        schedule.evaluated({"loss": loss})
        assert sgd.param_groups[0]["lr"] == rate


def test_a_plateau_in_the_loop(tmp_path: Path) -> None:
    """A loss that cannot get better (rate 0): patience 1, five evaluations."""
    run = make_run(
        tmp_path,
        steps=10,
        samples=80,
        optimizer=lambda model: SGD(model.parameters(), lr=0.0),
        scheduler=lambda sgd: plateau(sgd, min_lr=0.0),
        hooks={"evaluation": Evaluation(2)},
    )
    train(run)
    scheduler = run.schedule._scheduler
    assert scheduler is not None
    assert scheduler.last_epoch == 5


def test_a_plateau_may_watch_another_metric_and_says_which_there_are() -> None:
    sgd = optimizer()
    schedule = Schedule(plateau(sgd, mode="max", patience=0), "accuracy")
    schedule.evaluated({"loss": 1.0, "accuracy": 0.5})
    schedule.evaluated({"loss": 0.1, "accuracy": 0.5})
    assert sgd.param_groups[0]["lr"] == 0.5
    with pytest.raises(InputError) as caught:
        schedule.evaluated({"samples": 3, "loss": 1.0, "f1": 0.5})
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == ("scheduler.monitor", "accuracy")
    assert problem.fix == "choose of loss, f1"


# --- going on ---------------------------------------------------------------------------------------------------------

STEPPED: dict[str, Callable[[Optimizer], Any]] = {
    "linear": lambda o: linear(o, 20, warmup=3),
    "cosine": lambda o: cosine(o, 20, warmup=0.2, final=0.1),
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "multi_step": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 9, 9], 0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine_annealing": lambda o: lr_scheduler.CosineAnnealingLR(o, 7, eta_min=0.01),
    "warm_restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 2.0, total_steps=30),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, step_size_up=3),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 15, 2.0),
    "linear_lr": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 8),
    "constant_lr": lambda o: lr_scheduler.ConstantLR(o, 0.1, 8),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9 + step / 1000),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.CosineAnnealingLR(o, 20)], [4]
    ),
    # Deeper than this torch itself fails: a SequentialLR cannot start another one.
    "nested": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.SequentialLR(
                o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingWarmRestarts(o, 3)], [3]
            ),
            lr_scheduler.StepLR(o, 2, 0.5),
        ],
        [9],
    ),
    "chained_sequence": lambda o: lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.SequentialLR(
                o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.CosineAnnealingLR(o, 20)], [2]
            ),
            lr_scheduler.ExponentialLR(o, 0.95),
        ],
        o,
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.ExponentialLR(o, 0.95)], o
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at", [1, 5, 11])
@pytest.mark.parametrize("name", list(STEPPED))
def test_going_on_gives_the_rates_of_the_uninterrupted_run(name: str, at: int) -> None:
    def fresh() -> tuple[nn.Module, Optimizer, Schedule, OptimizerState]:
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        sgd = SGD(model.parameters(), lr=1.0, momentum=0.9)
        state = OptimizerState(model, sgd)
        return model, sgd, Schedule(STEPPED[name](sgd)), state

    def go(sgd: Optimizer, schedule: Schedule, steps: int) -> list[tuple[float, float]]:
        found = []
        for _ in range(steps):
            sgd.step()
            schedule.step()
            found.append((sgd.param_groups[0]["lr"], sgd.param_groups[0]["momentum"]))
        return found

    _, sgd, schedule, _ = fresh()
    expected = go(sgd, schedule, 18)
    _, sgd, schedule, state = fresh()
    go(sgd, schedule, at)
    saved, counters = state.state_dict(), schedule.state_dict()
    _, sgd, schedule, state = fresh()
    state.load_state_dict(saved)
    schedule.load_state_dict(counters)
    assert go(sgd, schedule, 18 - at) == expected[at:]
    assert schedule._scheduler.get_last_lr() == [expected[-1][0]]


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_plateau_goes_on_with_what_it_has_counted(at: int) -> None:
    losses = [1.0, 0.9, 0.9, 0.9, 0.95, 0.8, 0.8, 0.8]

    def go(schedule: Schedule, some: list[float]) -> list[float]:
        found = []
        for loss in some:
            schedule.evaluated({"loss": loss})
            found.append(schedule._scheduler.optimizer.param_groups[0]["lr"])
        return found

    expected = go(Schedule(plateau(optimizer(), cooldown=1)), losses)
    first = Schedule(plateau(optimizer(), cooldown=1))
    rate = [1.0, *go(first, losses[:at])][-1]
    second = Schedule(plateau(optimizer(rate), cooldown=1))
    second.load_state_dict(first.state_dict())
    assert go(second, losses[at:]) == expected[at:]


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_options_changed_on_purpose_apply_after_going_on() -> None:
    first = Schedule(linear(optimizer(), 10))
    for _ in range(5):
        first.step()
    sgd = optimizer(4.0)
    second = Schedule(linear(sgd, 20))
    second.load_state_dict(first.state_dict())
    assert sgd.param_groups[0]["lr"] == 4.0 * 0.75
    second.step()
    assert sgd.param_groups[0]["lr"] == pytest.approx(4.0 * (1 - 6 / 20))


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_options_of_torchs_schedulers_changed_on_purpose_apply_too() -> None:
    first = Schedule(lr_scheduler.StepLR(optimizer(), 4, 0.5))
    for _ in range(3):
        first.step()
    sgd = optimizer()
    second = Schedule(lr_scheduler.StepLR(sgd, 4, 0.1))
    second.load_state_dict(first.state_dict())
    second.step()
    assert sgd.param_groups[0]["lr"] == pytest.approx(0.1)


EXTENDED: dict[str, Callable[[Optimizer, int], Any]] = {
    "cosine_annealing": lambda o, total: lr_scheduler.CosineAnnealingLR(o, total),
    "polynomial": lambda o, total: lr_scheduler.PolynomialLR(o, total, 2.0),
    "linear": lambda o, total: lr_scheduler.LinearLR(o, 1.0, 0.0, total),
    "one_cycle": lambda o, total: lr_scheduler.OneCycleLR(o, 2.0, total_steps=total + 1),
    "sequential": lambda o, total: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.CosineAnnealingLR(o, total - 4)], [4]
    ),
    "chained": lambda o, total: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.CosineAnnealingLR(o, total)], o
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at", [0, 1, 7, 20])
@pytest.mark.parametrize("name", list(EXTENDED))
def test_an_extended_run_has_the_rates_of_one_that_was_planned_so_long(name: str, at: int) -> None:
    make = EXTENDED[name]
    model = nn.Linear(2, 2)

    def fresh(total: int) -> tuple[Optimizer, OptimizerState, Schedule]:
        sgd = SGD(model.parameters(), lr=1.0, momentum=0.9)
        return sgd, OptimizerState(model, sgd), Schedule(make(sgd, total), length=total)

    _, before, schedule = fresh(20)
    for _ in range(at):
        schedule.step()
    saved, counters = before.state_dict(), schedule.state_dict()
    sgd, state, schedule = fresh(40)
    state.load_state_dict(saved)
    schedule.load_state_dict(counters)
    schedule.catch_up(at)
    found = [sgd.param_groups[0]["lr"]]
    for _ in range(40 - at):
        schedule.step()
        found.append(sgd.param_groups[0]["lr"])
    assert found == rates(lambda o: make(o, 40), 40)[at:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(EXTENDED))
def test_going_back_in_an_extended_run_gives_the_same_rates_again(name: str) -> None:
    """A rollback loads the checkpoint of the shorter plan once more, into a schedule that has moved."""
    before = Schedule(EXTENDED[name](optimizer(), 20), length=20)
    for _ in range(8):
        before.step()
    sgd = optimizer()
    schedule = Schedule(EXTENDED[name](sgd, 40), length=40)
    for steps in (11, 3):
        schedule.load_state_dict(before.state_dict())
        found = [sgd.param_groups[0]["lr"]]
        for _ in range(steps):
            schedule.step()
            found.append(sgd.param_groups[0]["lr"])
        assert found == rates(lambda o: EXTENDED[name](o, 40), 40)[8 : 9 + steps]


@pytest.mark.filterwarnings("ignore")
def test_a_plateau_keeps_what_it_has_learnt_in_an_extended_run() -> None:
    first = Schedule(plateau(optimizer(), patience=0), length=10)
    for _ in range(3):
        first.evaluated({"loss": 1.0})
    sgd = optimizer(0.25)
    second = Schedule(plateau(sgd, patience=2), length=20)
    second.load_state_dict(first.state_dict())
    second.evaluated({"loss": 1.0})
    assert sgd.param_groups[0]["lr"] == 0.25
    assert second._scheduler.best == 1.0


class Phases(lr_scheduler.LRScheduler):
    """A scheduler of the user's own, with a counter of its own."""

    def __init__(self, sgd: Optimizer) -> None:
        self.phase = 0
        super().__init__(sgd)

    def get_lr(self) -> list[float]:
        self.phase += 1
        return [base / self.phase for base in self.base_lrs]


class Remembers(Phases):
    """Keeps its rates in a list that it goes on with."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.past: list[float] = []
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        self.past.append(1.0)
        return [base / len(self.past) for base in self.base_lrs]


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("kind", [Phases, Remembers])
def test_a_schedulers_own_counters_and_lists_are_kept(kind: type[Phases]) -> None:
    first = Schedule(kind(optimizer()))
    for _ in range(5):
        first.step()
    second = Schedule(kind(optimizer()))
    second.load_state_dict(first.state_dict())
    second.step()
    assert second._scheduler.get_last_lr() == [1 / 7]


@pytest.mark.parametrize(
    "make",
    [
        lambda sgd: cosine(sgd, 12, warmup=3),
        lambda sgd: lr_scheduler.StepLR(sgd, 4, gamma=0.5),
        lambda sgd: lr_scheduler.CosineAnnealingLR(sgd, 12),
        lambda sgd: lr_scheduler.OneCycleLR(sgd, 2.0, total_steps=13),
        lambda sgd: lr_scheduler.SequentialLR(
            sgd, [lr_scheduler.ConstantLR(sgd, 0.1, 2), lr_scheduler.ExponentialLR(sgd, 0.9)], [2]
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("before", [None, lambda sgd: lr_scheduler.PolynomialLR(sgd, 20)])
@pytest.mark.parametrize("done", [0, 1, 7])
def test_a_schedule_of_another_kind_stands_where_it_would_have_come_to(make: Any, before: Any, done: int) -> None:
    saved = Schedule(None if before is None else before(optimizer()))
    for _ in range(done):
        saved.step()
    sgd = optimizer()
    schedule = Schedule(make(sgd))
    sgd.param_groups[0]["lr"] = 77.0  # as a checkpoint left it
    schedule.load_state_dict(saved.state_dict())
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schedule.catch_up(done)
        for _ in range(12 - done):
            found.append(sgd.param_groups[0]["lr"])
            schedule.step()
    assert found == pytest.approx(rates(make, 12)[done:12])


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_catching_up_changes_nothing_where_the_kind_is_the_same() -> None:
    sgd = optimizer()
    saved = Schedule(linear(optimizer(), 10))
    for _ in range(3):
        saved.step()
    schedule = Schedule(linear(sgd, 10))
    schedule.load_state_dict(saved.state_dict())
    before = sgd.param_groups[0]["lr"]
    schedule.catch_up(9)
    assert sgd.param_groups[0]["lr"] == before == pytest.approx(0.7)
