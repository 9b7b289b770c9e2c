"""A run that is interrupted and goes on is, bit for bit, the run that was not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import Result, spec

Job = Callable[..., Result]

#: Dropout, accumulation, clipping; step 4 is in the middle of the first epoch (50 samples, 12 a step: 5 steps).
HARD: dict[str, Any] = {
    "model": spec("small.mlp", dropout=0.3),
    "batch__global_size": 12,
    "accumulation__steps": 2,
    "grad_clip": 0.5,
    "train__epochs": 3,
}


def without_clock(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


def hooks(name: str | None = None, **arguments: Any) -> dict[str, Any]:
    from small import config

    more = {} if name is None else {"more": spec(f"small.{name}", **arguments)}
    return {**config()["hooks"], **more}


def same(one: Result, other: Result) -> None:
    assert without_clock(other.records) == without_clock(one.records)
    assert other.watch.weights.keys() == one.watch.weights.keys()
    for name, value in one.watch.weights.items():
        assert torch.equal(other.watch.weights[name], value), name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "bf16_full"])
def test_interrupted_in_an_epoch(job: Job, precision: str) -> None:
    whole = job("whole", **HARD, precision=precision)
    assert whole.code == 0
    assert len(whole.losses) == 15
    first = job("cut", **HARD, precision=precision, hooks=hooks("Interrupt", step=4))
    assert first.code == 75
    assert first.summary["status"] == "interrupted"
    assert len(first.watch.losses) == 4
    second = job("cut", **HARD, precision=precision)
    assert second.code == 0
    assert second.summary["status"] == "completed"
    assert second.watch.losses == whole.watch.losses[4:]
    same(whole, second)


def test_crashed_after_a_checkpoint(job: Job) -> None:
    whole = job("whole", **HARD, checkpoint__every={"steps": 3})
    first = job("cut", **HARD, checkpoint__every={"steps": 3}, hooks=hooks("Crash", step=8))
    assert first.code == 1
    assert "crash on purpose" in first.summary["error"]
    assert first.train[-1]["step"] == 8
    second = job("cut", **HARD, checkpoint__every={"steps": 3})
    assert second.watch.losses == whole.watch.losses[6:]
    same(whole, second)
    assert [record["step"] for record in second.train] == list(range(1, 16))


def test_interrupted_at_every_step(job: Job) -> None:
    settings = {**HARD, "train__epochs": None, "train__steps": 6}
    whole = job("whole", **settings)
    for step in range(1, 6):
        assert job("cut", **settings, hooks=hooks("Interrupt", step=step)).code == 75
    same(whole, job("cut", **settings))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"data__num_workers": 0}, {"data__num_workers": 2}),
        (
            {"batch": {"global_size": 12, "micro_size": 6}},
            {"batch": {"global_size": 12, "micro_size": 6}, "log__every": 1},
        ),
    ],
)
def test_what_may_differ_changes_nothing(job: Job, first: dict[str, Any], then: dict[str, Any]) -> None:
    whole = job("whole", **HARD)
    job("cut", **{**HARD, **first}, hooks=hooks("Interrupt", step=4))
    same(whole, job("cut", **{**HARD, **then}))


@pytest.mark.parametrize(
    "optimizer",
    [
        spec("torch.optim.SGD", lr=0.1, momentum=0.9),
        spec("torch.optim.Adam", lr=0.01, amsgrad=True),
        spec("torch.optim.Adagrad", lr=0.01),
        spec("torch.optim.RMSprop", lr=0.01, momentum=0.5),
    ],
    ids=lambda value: value["_target_"].rpartition(".")[2],
)
def test_any_optimizer(job: Job, optimizer: dict[str, Any]) -> None:
    settings = {**HARD, "optimizer": optimizer, "train__epochs": 2}
    whole = job("whole", **settings)
    job("cut", **settings, hooks=hooks("Interrupt", step=4))
    same(whole, job("cut", **settings))


@pytest.mark.parametrize(
    "scheduler",
    [
        spec("torch.optim.lr_scheduler.OneCycleLR", max_lr=0.1, total_steps="_total_steps_"),
        spec("torch.optim.lr_scheduler.CosineAnnealingWarmRestarts", T_0=3, T_mult=2),
        spec("torch.optim.lr_scheduler.ReduceLROnPlateau", factor=0.5, patience=0, monitor="accuracy", mode="max"),
    ],
    ids=lambda value: value["_target_"].rpartition(".")[2],
)
def test_torchs_schedulers(job: Job, scheduler: dict[str, Any]) -> None:
    settings = {**HARD, "scheduler": scheduler, "eval__every": 2}
    whole = job("whole", **settings)
    job("cut", **settings, hooks=hooks("Interrupt", step=7))
    same(whole, job("cut", **settings))


def test_a_plateau_before_its_first_evaluation(job: Job) -> None:
    scheduler = spec("torch.optim.lr_scheduler.ReduceLROnPlateau", factor=0.5, patience=0)
    settings = {**HARD, "scheduler": scheduler}
    whole = job("whole", **settings)
    job("cut", **settings, hooks=hooks("Interrupt", step=2))
    same(whole, job("cut", **settings))


def test_a_finished_run_says_so_and_a_longer_one_goes_on(job: Job) -> None:
    settings = {**HARD, "scheduler": None, "train__epochs": None}
    whole = job("whole", **settings, train__steps=8)
    job("cut", **settings, train__steps=5)
    again = job("cut", **settings, train__steps=5)
    assert again.code == 0
    assert again.watch.losses == []
    longer = job("cut", **settings, train__steps=8)
    assert longer.watch.losses == whole.watch.losses[5:]
    assert [record["step"] for record in longer.train] == list(range(1, 9))
