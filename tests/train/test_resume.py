"""A run that is interrupted and goes on is, bit for bit, the run that was not."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Result, config, spec
from torch.utils.data import Dataset

from runner.data.synthetic import random_classification
from runner.train.hook import Hook
from runner.train.run import Run

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


# --- anywhere, in any data --------------------------------------------------------------------------------------------


class Rows(Dataset[Any]):
    """50 samples of uneven lengths, augmented by torch's own generator."""

    def __init__(self) -> None:
        self.data = random_classification(50, 8, 3)
        self.lengths = [1 + i * 7 % 13 for i in range(50)]

    def __len__(self) -> int:
        return 50

    def __getitem__(self, i: int) -> Any:
        inputs, label = self.data[i]
        return inputs + 0.1 * torch.randn(8), label


class Killed(Hook):
    """What a SIGKILL at the end of a step leaves: the folder as it is then, with half a line in the records."""

    def __init__(self, step: int, to: str) -> None:
        self.step, self.to = step, Path(to)

    def on_step_end(self, run: Run) -> None:
        if run.progress.step == self.step:
            shutil.copytree(run.folder.path, self.to)
            with (self.to / "metrics.jsonl").open("a") as file:
                file.write('{"split": "train", "st')
            raise RuntimeError("killed")


class At(Killed):
    """As Killed, at the end of the run: everything is saved, and nobody has said that it is complete."""

    def __init__(self, to: str) -> None:
        super().__init__(-1, to)

    def on_run_end(self, run: Run) -> None:
        shutil.copytree(run.folder.path, self.to)


class AfterEvaluation(Killed):
    """As Killed, after an evaluation."""

    def on_step_end(self, run: Run) -> None: ...

    def on_eval_end(self, run: Run, metrics: Any) -> None:
        run.trackers.flush()
        super().on_step_end(run)


def drawn(seed: int) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """A training of 15 steps with a shape of its own, and where and how it is ended."""
    draw = random.Random(seed)
    data = draw.choice(["Rows", "Rows", "Stream", "Stateful"])
    settings = {
        **HARD,
        "train": {"epochs": None, "steps": 15},
        "data": {
            **config()["data"],
            "train": spec("test_resume.Rows" if data == "Rows" else f"small.{data}"),
            "eval": spec("test_resume.Rows"),
            "num_workers": draw.choice([0, 0, 1, 2]),
            "group_by_length": data == "Rows" and draw.random() < 0.5,
        },
        "accumulation__steps": draw.choice([1, 2, 3]),
        "eval__every": draw.choice([2, 4, "epoch"]),
        "checkpoint__every": {"steps": draw.choice([2, 3, 5])},
        "checkpoint__async": draw.random() < 0.5,
    }
    ends = [(draw.choice(["Interrupt", "Crash", "Killed"]), step) for step in sorted(draw.sample(range(1, 15), 2))]
    return settings, ends


@pytest.mark.parametrize("seed", range(8))
def test_ended_anyhow_anywhere(job: Job, tmp_path: Path, seed: int) -> None:
    settings, ends = drawn(seed)
    board = {**config()["trackers"], "tensorboard": spec("runner.trackers.tensorboard.TensorBoard", seconds=0.02)}
    more = {"ema": spec("runner.hooks.ema.EMA", decay=0.5)}
    whole = job("whole", **settings, hooks={**hooks(), **more})
    folder = "cut"
    for number, (kind, step) in enumerate(ends):
        end = spec(f"small.{kind}", step=step)
        if kind == "Killed":
            end = spec("test_resume.Killed", step=step, to=str(tmp_path / f"killed{number}"))
        job(folder, **settings, hooks={**hooks(), **more, "end": end}, trackers=board)
        folder = f"killed{number}" if kind == "Killed" else folder
    last = job(folder, **settings, hooks={**hooks(), **more}, trackers=board)
    assert last.code == 0
    same(whole, last)
    assert [record["step"] for record in last.train] == list(range(1, 16))
    assert on_board(last, "train/loss") == list(range(1, 16))
    assert on_board(last, "eval/loss") == [record["step"] for record in whole.eval]


def on_board(result: Result, tag: str) -> list[int]:
    """The steps of a curve as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(result.path / "tensorboard"))
    accumulator.Reload()
    return [event.step for event in accumulator.Scalars(tag)]


def test_an_evaluation_that_was_owed_is_recorded_once(job: Job, tmp_path: Path) -> None:
    """A signal during the evaluation of step 4; the run that makes it up is killed right after."""
    board = {**config()["trackers"], "tensorboard": spec("runner.trackers.tensorboard.TensorBoard")}
    settings = {**HARD, "eval__every": 4, "trackers": board}
    whole = job("whole", **settings)
    first = job("cut", **settings, hooks=hooks("Interrupt", step=4))
    assert (first.code, first.eval) == (75, [])
    kill = spec("test_resume.AfterEvaluation", step=4, to=str(tmp_path / "killed"))
    second = job("cut", **settings, hooks={**config()["hooks"], "end": kill})
    assert [record["step"] for record in second.eval] == [4]
    last = job("killed", **settings)
    assert last.code == 0
    same(whole, last)
    assert on_board(last, "eval/loss") == on_board(whole, "eval/loss") == [4, 8, 12, 15]


def test_killed_after_everything_is_saved(job: Job, tmp_path: Path) -> None:
    """Nothing is evaluated again, and the summary tells what the evaluation before has found."""
    settings = {**HARD, "eval__every": 4}
    whole = job("whole", **settings, hooks={**config()["hooks"], "end": at(tmp_path / "killed")})
    again = job("killed", **settings)
    assert again.code == 0
    assert without_clock(again.records) == without_clock(whole.records)
    assert again.summary["metrics"] == whole.summary["metrics"]
    assert again.summary["steps"] == 15


def test_a_training_that_was_stopped_early_stays_so(job: Job, tmp_path: Path) -> None:
    """Killed after everything is saved, and before anybody said so; a longer plan goes on from there."""
    settings = {**HARD, "eval__every": 4}
    stops = {"stop": spec("runner.hooks.early_stop.EarlyStop", metric="loss", mode="min", patience=1)}
    whole = job("whole", **settings, hooks={**hooks(), **stops, "end": at(tmp_path / "killed")})
    assert whole.summary["steps"] == 8
    again = job("killed", **settings, hooks={**hooks(), **stops})
    assert again.code == 0
    assert again.watch.losses == []
    same(whole, again)
    assert again.summary["steps"] == 8
    assert again.summary["status"] == "completed"
    longer = job("killed", **{**settings, "train__epochs": 4}, hooks={**hooks(), **stops})
    assert longer.summary["steps"] == 12
    # Whoever names it as a beginning wants to go on.
    other = job("other", **settings, hooks=hooks(), resume=str(tmp_path / "whole"))
    assert other.summary["steps"] == 15


def test_the_best_is_kept_where_its_evaluation_was_owed(job: Job) -> None:
    best = {"checkpoint__best": {"metric": "loss", "mode": "min"}, "checkpoint__every": {"steps": 5}}
    settings = {**HARD, **best, "eval__every": 4}
    whole = job("whole", **settings)
    assert whole.summary["best"]["step"] == 4
    assert job("cut", **settings, hooks=hooks("Interrupt", step=4)).code == 75
    again = job("cut", **settings)
    same(whole, again)
    for key in ("metric", "value", "step"):
        assert again.summary["best"][key] == whole.summary["best"][key]
    kept = [sorted(path.name for path in (run.path / "checkpoints").iterdir()) for run in (whole, again)]
    assert kept[0] == kept[1]


def at(folder: Path) -> dict[str, Any]:
    return spec("test_resume.At", to=str(folder))


def test_killed_before_the_first_checkpoint(job: Job, tmp_path: Path) -> None:
    """The run begins anew, and its records do as well."""
    board = {**config()["trackers"], "tensorboard": spec("runner.trackers.tensorboard.TensorBoard", seconds=0.0)}
    settings = {**HARD, "trackers": board}
    whole = job("whole", **settings)
    kill = spec("test_resume.Killed", step=3, to=str(tmp_path / "killed"))
    job("cut", **settings, hooks={**config()["hooks"], "end": kill})
    again = job("killed", **settings)
    same(whole, again)
    assert on_board(again, "train/loss") == list(range(1, 16))


class Service:
    """A tracker like a service's: it knows the run under a name, which goes on."""

    last: Service

    def __init__(self) -> None:
        Service.last = self
        self.name: str | None = None
        self.steps: list[int] = []

    def start(self, folder: Path, step: int, config: Any) -> None:
        self.name = self.name or f"run-{id(self)}"

    def log(self, record: Any) -> None:
        self.steps.append(record["step"])

    def close(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.name = state["name"]


def test_a_trackers_run_goes_on(job: Job) -> None:
    settings = {**HARD, "trackers": {**config()["trackers"], "service": spec("test_resume.Service")}}
    job("cut", **settings, hooks=hooks("Interrupt", step=4))
    first = Service.last
    job("cut", **settings)
    assert Service.last is not first
    assert Service.last.name == first.name
    assert Service.last.steps[0] == 5


def test_a_tracker_that_is_new_or_gone_does_not_matter(job: Job) -> None:
    service = {**config()["trackers"], "service": spec("test_resume.Service")}
    assert job("cut", **HARD, hooks=hooks("Interrupt", step=2)).code == 75
    assert job("cut", **HARD, hooks=hooks("Interrupt", step=4), trackers=service).code == 75
    assert job("cut", **HARD).code == 0


def test_early_stopping_goes_on_counting(job: Job) -> None:
    stop = spec("runner.hooks.early_stop.EarlyStop", patience=3, min_delta=100.0)
    settings = {**HARD, "eval__every": 2}
    whole = job("whole", **settings, hooks={**hooks(), "stop": stop})
    job("cut", **settings, hooks={**hooks("Interrupt", step=5), "stop": stop})
    cut = job("cut", **settings, hooks={**hooks(), "stop": stop})
    assert whole.summary["steps"] == cut.summary["steps"] == 8
    same(whole, cut)
