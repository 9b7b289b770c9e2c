"""Another global batch in a run that goes on: the warning says in numbers what it makes of the place in the data."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small import Result, config, data, spec

from runner.assemble import check
from runner.checkpoint import find
from runner.data.order import Order
from runner.drift import compare
from runner.launch.worker import WorkPlan

Job = Callable[..., Result]

BEGIN = "batch.global_size was 8 and is "
PLACE = "The place in the data is step x batch.global_size: after step"


def warned(folder: Path, **changes: Any) -> str:
    """What is said of the global batch where the run in `folder` goes on."""
    settings = config(resume_allow=["batch"], **changes)
    plan = WorkPlan(settings, settings, ["+recipe=small"], str(folder), time.time(), run_dir="run")
    (line,) = [line for line in compare(plan, check(settings), find(folder / "run")).warnings if line.startswith(BEGIN)]
    return line


def stopped(job: Job, step: int, **changes: Any) -> None:
    stop = {"stop": spec("small.Interrupt", step=step)}
    assert job(hooks={**config()["hooks"], **stop}, eval__every="never", **changes).code == 75


@pytest.mark.parametrize(
    ("step", "size", "numbers"),
    [
        (4, 4, "it was 32 and is 16, so 16 samples are seen again"),
        (4, 16, "it was 32 and is 50, so 18 samples are passed over"),
        (2, 16, "it was 16 and is 32, so 16 samples are passed over"),
        (8, 4, "it was 58 and is 32, so 26 samples are seen again"),
    ],
)
def test_of_data_with_an_index(job: Job, tmp_path: Path, step: int, size: int, numbers: str) -> None:
    """50 samples; the last step of an epoch is short."""
    stopped(job, step)
    assert warned(tmp_path, batch__global_size=size) == f"{BEGIN}{size}: allowed, and applies. {PLACE} {step} {numbers}"


def test_the_numbers_are_those_of_the_order() -> None:
    """With 4 in the place of 8, step 4 is what the third step of 8 began with."""
    assert Order(50, 4).indices(4).tolist() == Order(50, 8).indices(2)[:4].tolist()


def test_where_the_last_step_is_left_out(job: Job, tmp_path: Path) -> None:
    found = {**config()["data"], "train": data(50), "drop_last": True}
    stopped(job, 5, data=found)
    said = warned(tmp_path, data=found, batch__global_size=16)
    assert said.endswith(f"{PLACE} 5 it was 40 and is 80, so 40 samples are passed over")


def test_where_every_step_is_an_epoch(job: Job, tmp_path: Path) -> None:
    stopped(job, 1, data__train=data(6))
    said = warned(tmp_path, data__train=data(6), batch__global_size=16)
    assert said.endswith("The place in the data stays the same")


@pytest.mark.parametrize("kind", ["Stream", "Stateful"])
def test_of_streams(job: Job, tmp_path: Path, kind: str) -> None:
    settings = {"data__train": spec(f"small.{kind}"), "train": {"epochs": None, "steps": 9}}
    stopped(job, 4, **settings)
    said = warned(tmp_path, **settings, batch__global_size=4)
    if kind == "Stream":
        assert said.endswith(f"{PLACE} 4 it was 32 and is 16, so at most 16 samples are seen again")
    else:
        assert said.endswith("The stream goes on by its own state: no sample is passed over or seen again")
