"""The average of the weights: its numbers, and that training never sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import sharding
from memory import Bytes
from processes import run_ranks
from small import Result, config, spec
from small import run as make_run
from torch import Tensor, nn

from runner.checkpoint import Checkpointer
from runner.errors import InputError
from runner.hooks.ema import EMA
from runner.hooks.evaluation import Evaluation
from runner.train.evaluate import evaluate as evaluate_run
from runner.train.hook import Hook
from runner.train.loop import train
from runner.train.run import Run

pytestmark = pytest.mark.usefixtures("quiet")

Job = Callable[..., Result]


class Formula(Hook):
    """The plain formula, in float64, and the weights of every step."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: list[Tensor] = []

    def on_run_start(self, run: Run) -> None:
        self.average = [p.detach().double().clone() for p in run.engine.model.parameters() if p.requires_grad]

    def on_step_end(self, run: Run) -> None:
        weights = [p.detach().double() for p in run.engine.model.parameters() if p.requires_grad]
        self.average = [self.decay * a + (1 - self.decay) * w for a, w in zip(self.average, weights, strict=True)]


def close(one: list[Tensor], other: list[Tensor], tolerance: float = 1e-6) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("precision", ["fp32", "bf16_full"])
def test_the_numbers_of_the_formula(tmp_path: Path, decay: float, precision: str) -> None:
    hook, formula = EMA(decay), Formula(decay)
    train(make_run(tmp_path, hooks={"ema": hook, "formula": formula}, precision=precision))
    assert all(average.dtype == torch.float32 for average in hook._averages)
    close(hook._averages, formula.average)


def test_evaluation_sees_the_averages_and_training_its_weights(tmp_path: Path) -> None:
    hook = EMA(0.9)
    seen: dict[bool, list[Tensor]] = {True: [], False: []}

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen[self.training].append(self.weight.detach().clone())
            return super().forward(x)

    class Compare(Hook):
        def on_step_end(self, run: Run) -> None:
            self.weight = run.engine.model.weight.detach().clone()

        def on_eval_end(self, run: Run, metrics: Any) -> None:
            close([seen[False][-1]], [hook._averages[0]], 0.0)
            assert not torch.equal(seen[False][-1], self.weight)
            assert torch.equal(run.engine.model.weight, self.weight)

    hooks = {"ema": hook, "evaluation": Evaluation(2), "compare": Compare()}
    train(make_run(tmp_path, model=lambda: Net(8, 3), hooks=hooks))
    assert (len(seen[True]), len(seen[False])) == (6, 6)  # three evaluations of two batches


def test_evaluating_changes_nothing_of_the_training(tmp_path: Path) -> None:
    found = []
    for hooks in ({}, {"ema": EMA(0.5), "evaluation": Evaluation(1)}):
        run = make_run(tmp_path, hooks=hooks)
        train(run)
        found.append([p.detach() for p in run.engine.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_metrics_are_those_of_the_averages(tmp_path: Path) -> None:
    results = {}
    for evaluate in (True, False):
        run = make_run(tmp_path, hooks={"ema": EMA(0.99, evaluate=evaluate)})
        train(run)
        results[evaluate] = run.metrics["loss"]
    untrained = evaluate_run(make_run(tmp_path))["loss"]
    # Hardly moved by six steps of 0.99, so near the untrained model.
    assert 0 < abs(results[True] - untrained) < abs(results[False] - untrained) / 4


def test_weights_come_back_when_an_evaluation_fails(tmp_path: Path) -> None:
    hook = EMA(0.9)
    run = make_run(tmp_path, hooks={"ema": hook}, eval_set=None)
    train(run)
    weights = [p.detach().clone() for p in run.engine.model.parameters()]
    with pytest.raises(RuntimeError), hook.swapped():
        raise RuntimeError
    assert all(torch.equal(a, b) for a, b in zip(run.engine.model.parameters(), weights, strict=True))


def test_frozen_parameters_have_no_average(tmp_path: Path) -> None:
    hook = EMA()
    model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 3))
    train(make_run(tmp_path, hooks={"ema": hook}, model=lambda: model, steps=1))
    assert list(hook.state_dict()["averages"]) == ["1.weight", "1.bias"]


def settings(**more: Any) -> dict[str, Any]:
    hooks = {**config()["hooks"], "ema": spec("runner.hooks.ema.EMA", decay=0.8), **more}
    return {"hooks": hooks, "train__epochs": 2}


def test_the_averages_go_through_a_resume(job: Job) -> None:
    whole = job("whole", **settings())
    job("cut", **settings(stop=spec("small.Interrupt", step=5)))
    cut = job("cut", **settings())
    assert [{**record, "time": 0} for record in cut.eval] == [{**record, "time": 0} for record in whole.eval]
    assert all(torch.equal(cut.watch.weights[name], value) for name, value in whole.watch.weights.items())


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_decay_that_cannot_be(decay: float) -> None:
    with pytest.raises(InputError, match="is not between 0 and 1"):
        EMA(decay)


def averaging(backend: str, replicas: int = 1) -> tuple[Any, EMA]:
    """A model of odd shapes and the hook, before anything is loaded."""
    made = sharding.prepared(backend, replicas=replicas)
    hook = EMA(0.5)
    hook.placed(made)
    return made, hook


def saved_by_parts(folder: Path) -> dict[str, Any]:
    made, hook = averaging("fsdp")
    for step in range(2):
        sharding.step_of(made, step)
        hook.on_step_end(None)  # type: ignore[arg-type]
    Checkpointer(folder, {"ema": hook}).save(2)
    averages = hook.state_dict()["averages"]
    parts = sum(average.numel() for average in hook._averages)
    whole = {name: sharding.whole_of(value) for name, value in averages.items()}
    return {"parts": parts, "values": whole}


def loaded_by_parts(folder: Path) -> list[dict[str, Tensor]]:
    """On the same processes as parts, in two replicas, and whole."""
    found = []
    for backend, replicas in (("fsdp", 1), ("fsdp", 2), ("ddp", 1)):
        _, hook = averaging(backend, replicas)
        own = hook.state_dict()["averages"]
        checkpointer = Checkpointer(folder / ".other", {"ema": hook})
        target = hook.template({"averages": own})
        assert all(value is own[name] for name, value in target["averages"].items())
        checkpointer.load(folder / "step_00000002")
        with Bytes() as made:
            hook.load_state_dict(target)
        assert made.most == 0
        found.append({name: sharding.whole_of(value) for name, value in own.items()})
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_each_process_saves_and_loads_its_part(tmp_path: Path, world: int) -> None:
    saved = run_ranks(saved_by_parts, 2, tmp_path)
    values = saved[0]["values"]
    # Beside the parts there is one number, which every process has.
    assert sum(rank["parts"] for rank in saved) == sum(value.numel() for value in values.values()) + 1
    for rank in run_ranks(loaded_by_parts, world, tmp_path):
        for found in rank:
            assert found.keys() == values.keys()
            assert all(torch.equal(found[name], value) for name, value in values.items())


def test_averages_of_other_weights_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    hook = EMA()
    hook.placed(run.engine)
    averages = hook.state_dict()["averages"]
    with pytest.raises(InputError, match=r"it lacks 3\.bias"):
        hook.template({"averages": {name: value for name, value in averages.items() if name != "3.bias"}})


def test_averages_begin_with_the_weights_that_were_loaded(tmp_path: Path) -> None:
    """A checkpoint without averages: what was there before it was loaded must not count."""
    run, hook = make_run(tmp_path, save=True), EMA()
    assert run.checkpointer is not None
    hook.placed(run.engine)
    with torch.no_grad():
        run.engine.model[0].weight.fill_(7.0)
    hook.on_run_start(run)
    assert torch.equal(hook._averages[0], torch.full_like(hook._averages[0], 7.0))
