"""From configuration to objects: what is found wrong before a model exists, and what is built."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import config, data, spec
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from runner.assemble import assemble, check
from runner.errors import InputError
from runner.folder import RunFolder
from runner.train.hook import Hook
from runner.train.run import Run

pytestmark = pytest.mark.usefixtures("quiet")


def problems(**changes: Any) -> list[tuple[str | None, str]]:
    with pytest.raises(InputError) as caught:
        check(config(**changes))
    return [(problem.key, problem.why) for problem in caught.value.problems]


def made(folder: Path, **changes: Any) -> Run:
    settings = config(**changes)
    return assemble(settings, check(settings), RunFolder(folder), resume=None)


class Endless(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


class Lengths(TensorDataset):
    lengths = [1, 2, 3, 4] * 3

    def __init__(self) -> None:
        super().__init__(torch.randn(12, 8), torch.arange(12) % 3)


class Misnamed(Hook):
    def on_step_ends(self, run: Run) -> None: ...


def both(samples: int = 6, held_out: bool = True) -> Any:
    made_of = [TensorDataset(torch.randn(n, 8), torch.zeros(n, dtype=torch.int64)) for n in (samples, 2)]
    return SimpleNamespace(train=made_of[0], eval=made_of[1] if held_out else None, collate=lambda samples: "collated")


def absent(path: str) -> Any:
    return open(path)


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_everything_that_signatures_show_at_once() -> None:
    found = problems(
        model=spec("torch.nn.Linear", in_features=4),
        task=spec("runner.tasks.classification.Classificatoin"),
        optimizer=spec("torch.optim.AdamW", learning_rate=1),
        scheduler=spec("runner.train.schedules.cosine", warm=1),
        data__train=data(10) | {"sampels": 3},
        hooks={"a": spec("test_assemble.Misnamed"), "b": None, "c": spec("nosuchpackage.Hook")},
        trackers={"t": spec("runner.trackers.jsonl.Jsonl", path="x")},
        precision="tf32",
    )
    assert [key for key, _ in found] == [
        "model",
        "task._target_",
        "optimizer.learning_rate",
        "scheduler.warm",
        "data.train.sampels",
        "hooks.a",
        "hooks.c._target_",
        "trackers.t.path",
        "precision",
    ]


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert problems(device="cuda") == [("device", "there is no such device here")]


def test_something_else_than_a_task() -> None:
    ((key, why),) = problems(task=spec("torch.nn.Identity"))
    assert key == "task._target_"
    assert "has no inputs, loss, weight, metrics, check" in why


def test_data_that_are_empty_or_cannot_be_indexed() -> None:
    assert problems(data__train=data(0), data__eval=data(0)) == [
        ("data.train", "is empty: it has no sample"),
        ("data.eval", "is empty: it has no sample"),
    ]


def test_a_stream_needs_a_number_of_steps() -> None:
    ((key, why),) = problems(data__train=spec("test_assemble.Endless"))
    assert (key, "length" in why) == ("train.epochs", True)
    plan = check(config(data__train=spec("test_assemble.Endless"), train={"epochs": None, "steps": 5})).plan
    assert plan.steps == 5


def test_dropping_the_last_step_may_leave_nothing() -> None:
    found = {**config()["data"], "train": data(7), "drop_last": True}
    assert problems(data=found) == [("data.drop_last", "leaves nothing: 7 samples are fewer than batch.global_size=8")]


def test_grouping_needs_lengths() -> None:
    assert {key for key, _ in problems(data__group_by_length=True)} == {"data.group_by_length"}


def test_labels_outside_the_classes() -> None:
    assert [key for key, _ in problems(task=spec("runner.tasks.classification.Classification", num_classes=2))] == [
        "data.train",
        "data.eval",
    ]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = str(tmp_path / "none.tsv")
    assert problems(data__train=spec("test_assemble.absent", path=path)) == [
        ("data.train", "No such file or directory")
    ]


def test_a_warmup_longer_than_the_run() -> None:
    ((key, why),) = problems(scheduler=spec("runner.train.schedules.linear", warmup=100))
    assert key == "scheduler.warmup"
    assert "longer than the run of 14" in why


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (spec("builtins.dict"), "built a dict"),
        (spec("torch.nn.ReLU"), "no parameter that can be trained"),
        (spec("torch.nn.Linear", in_features=-1, out_features=2), "negative dimension"),
    ],
)
def test_models_that_cannot_be_trained(tmp_path: Path, model: dict[str, Any], words: str) -> None:
    with pytest.raises((InputError, RuntimeError), match=words):
        made(tmp_path, model=model)


@pytest.mark.parametrize("rate", [-1, float("nan"), "abc"])
def test_an_optimizers_own_refusal_is_the_users_error(tmp_path: Path, rate: Any) -> None:
    with pytest.raises(InputError) as caught:
        made(tmp_path, optimizer=spec("torch.optim.AdamW", lr=rate))
    assert caught.value.problems[0].key == "optimizer"


# --- what is built ----------------------------------------------------------------------------------------------------


def test_data_by_one_target_that_makes_both() -> None:
    one = {**config()["data"], "train": None, "eval": None, "_target_": "test_assemble.both"}
    parts = check(config(data=one))
    assert (len(parts.train), len(parts.eval), parts.collate([])) == (6, 2, "collated")
    parts = check(config(data={**one, "samples": 9, "held_out": False}))
    assert (len(parts.train), parts.eval) == (9, None)
    assert problems(data={**one, "sampels": 9})[0][0] == "data.sampels"


def test_a_collate_of_ones_own_wins() -> None:
    collate = spec("torch.utils.data.default_collate", _partial_=True)
    one = {**config()["data"], "train": None, "eval": None, "_target_": "test_assemble.both", "collate": collate}
    parts = check(config(data=one))
    assert parts.collate is not None
    assert parts.collate([1, 2]).tolist() == [1, 2]


def test_the_optimizer_has_its_groups_and_is_fused(tmp_path: Path) -> None:
    optimizer = made(tmp_path).engine.optimizer
    assert [(len(group["params"]), group["weight_decay"], group["fused"]) for group in optimizer.param_groups] == [
        (2, 0.01, True),
        (2, 0.0, True),
    ]


@pytest.mark.parametrize(
    "scheduler",
    [
        spec("torch.optim.lr_scheduler.MultiStepLR", milestones=[2, 4], gamma=0.1),
        spec("torch.optim.lr_scheduler.CosineAnnealingLR", T_max="_total_steps_"),
        spec("torch.optim.lr_scheduler.StepLR", step_size="_steps_per_epoch_"),
        spec("torch.optim.lr_scheduler.OneCycleLR", max_lr=0.1),
        spec("torch.optim.lr_scheduler.LambdaLR", lr_lambda=spec("builtins.float", _partial_=True)),
    ],
    ids=lambda value: value["_target_"].rpartition(".")[2],
)
def test_any_scheduler_of_torchs(tmp_path: Path, scheduler: dict[str, Any]) -> None:
    run = made(tmp_path, scheduler=scheduler)
    built = run.schedule._scheduler
    assert type(built).__name__ == scheduler["_target_"].rpartition(".")[2]
    assert run.plan.steps == 14
    for name in ("T_max", "total_steps"):
        assert getattr(built, name, 14) == 14
    assert getattr(built, "step_size", 7) == 7


def test_no_scheduler(tmp_path: Path) -> None:
    assert made(tmp_path, scheduler=None).schedule.state_dict() == {}


@pytest.mark.parametrize(
    ("changes", "steps", "per_epoch"),
    [
        ({}, 14, 7),
        ({"train__epochs": None, "train__steps": 9}, 9, 7),
        ({"data": {**config()["data"], "drop_last": True}}, 12, 6),
    ],
)
def test_the_length_of_a_run(tmp_path: Path, changes: dict[str, Any], steps: int, per_epoch: int) -> None:
    run = made(tmp_path, **changes)
    assert (run.plan.steps, run.plan.steps_per_epoch) == (steps, per_epoch)


@pytest.mark.parametrize(("every", "hook"), [("epoch", [None]), (5, [5]), ("never", [])])
def test_evaluation_is_a_hook_made_from_its_key(tmp_path: Path, every: Any, hook: list[Any]) -> None:
    run = made(tmp_path, eval__every=every)
    assert [item._steps for name, item in run.hooks.items() if name == "evaluation"] == hook


def test_a_removed_hook_is_not_there_and_the_others_keep_their_order(tmp_path: Path) -> None:
    hooks = {"a": spec("small.Watch"), "b": None, "c": spec("runner.hooks.ema.EMA")}
    run = made(tmp_path, hooks=hooks, eval__every="never")
    assert list(run.hooks) == ["a", "c"]


@pytest.mark.parametrize(
    ("every", "steps", "seconds"),
    [(None, None, None), ({"steps": 3}, 3, None), ({"epochs": 2}, 14, None), ({"seconds": 60}, None, 60)],
)
def test_when_checkpoints_are_due(tmp_path: Path, every: Any, steps: int | None, seconds: float | None) -> None:
    run = made(tmp_path, checkpoint__every=every)
    assert (run.save_every.steps, run.save_every.seconds) == (steps, seconds)


def test_no_checkpoints(tmp_path: Path) -> None:
    assert made(tmp_path, checkpoint=None).checkpointer is None


def test_grouping_reaches_both_loaders(tmp_path: Path) -> None:
    found = {**config()["data"], "train": spec("test_assemble.Lengths"), "eval": spec("test_assemble.Lengths")}
    run = made(tmp_path, data={**found, "group_by_length": True}, batch={"global_size": 4, "micro_size": 4})
    steps = [sorted(Lengths.lengths[i] for i in run.train_data.order.indices(step).tolist()) for step in range(3)]
    assert sorted(steps) == [[1, 1, 1, 2], [2, 2, 3, 3], [3, 4, 4, 4]]
    assert run.eval_data is not None
    assert [Lengths.lengths[i] for i in run.eval_data.order.indices(0).tolist()] == [1, 1, 1, 2]


def test_the_seed_makes_the_weights(tmp_path: Path) -> None:
    one, same, other = (made(tmp_path, seed=seed).engine.model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["0.weight"], other["0.weight"])


def test_threads_and_kernels_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    made(tmp_path)
    assert asked == []
    made(tmp_path, launch={"nproc_per_node": 1, "threads": 3}, determinism="kernels")
    assert asked == [3, True]


def test_any_module_is_a_model(tmp_path: Path) -> None:
    run = made(
        tmp_path, model=spec("torch.nn.Sequential", _args_=[spec("torch.nn.Linear", in_features=8, out_features=3)])
    )
    assert isinstance(run.engine.model[0], nn.Linear)
