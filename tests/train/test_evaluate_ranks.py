"""Evaluation by several processes: every sample once, the same record everywhere, equal to one process's."""

from __future__ import annotations

import signal
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from processes import run_ranks
from small import CLASSES, FEATURES, engine
from small import run as make_run
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

from runner import distributed, metrics
from runner.data.reading import Reading
from runner.engine.mesh import Mesh
from runner.tasks.classification import Classification
from runner.train.evaluate import evaluate
from runner.train.run import Run

pytestmark = pytest.mark.usefixtures("quiet")

LENGTHS = [1, 2, 3, 5, 8, 13]


class Seen:
    """A meter without `synchronise`: which targets it saw, in which order."""

    def reset(self) -> None:
        self.targets: list[int] = []

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        assert predictions.shape == targets.shape
        self.targets += targets.tolist()

    def compute(self) -> float:
        return sum((i + 1) * (target + 1) for i, target in enumerate(self.targets))


class Sometimes(Classification):
    """Reports a name only for batches that have a sample of class 0, and whole numbers."""

    def metrics(self, outputs: Tensor, batch: Any) -> dict[str, Any]:
        labels = batch[1]
        zeros = (labels == 0).sum()
        found = dict(super().metrics(outputs, batch))
        return {**found, "counted": (labels.sum(), 2 * len(labels)), **({"zeros": (zeros * 3, zeros)} if zeros else {})}


class Counting(nn.Linear):
    """How often it was called."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def model() -> nn.Module:
    return Counting(FEATURES, CLASSES)


def held_out(samples: int) -> TensorDataset:
    made = torch.Generator().manual_seed(samples)
    return TensorDataset(
        torch.randn(samples, FEATURES, generator=made), torch.randint(CLASSES, (samples,), generator=made)
    )


class Stream(IterableDataset):
    """Samples one by one; its length is not known."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return iter(self.data)


def meters() -> dict[str, Any]:
    from torchmetrics.classification import MulticlassF1Score
    from torchmetrics.regression import SpearmanCorrCoef

    class Ranks(SpearmanCorrCoef):
        """Keeps all values: a state that is a list."""

        def update(self, predictions: Tensor, targets: Tensor) -> None:
            super().update(predictions.double(), targets.double())

    return {
        "f1": metrics.F1(),
        "top_2": metrics.TopKAccuracy(2),
        "perplexity": metrics.Perplexity(),
        "their_f1": MulticlassF1Score(CLASSES, average="macro"),
        "their_spearman": Ranks(),
        "seen": Seen(),
    }


def a_run(samples: int, micro: int, *, stream: bool = False, main: bool = False, workers: int = 0) -> Run:
    mesh = Mesh(distributed.rank(), distributed.world_size())
    reading = Reading(reader=mesh.data_rank, readers=mesh.data_size, main=main, num_workers=workers)
    data: Any = Stream(held_out(samples)) if stream else held_out(samples)
    return make_run(
        Path(mkdtemp()),
        engine=engine(model, mesh=mesh),
        task=Sometimes(meters=meters()),
        eval_data=reading.evaluation(data, micro),
    )


def records() -> list[dict[str, Any]]:
    """Records of every case, in order, and what shows whether the processes went through the model alike."""
    found = []
    for samples in LENGTHS:
        for micro in (1, 4):
            for how in ({}, {"main": True}, {"stream": True}, {"stream": True, "main": True}):
                run = a_run(samples, micro, **how)
                record = evaluate(run)
                assert record is not None
                found.append({**record, "calls": run.engine.model.calls, "targets": run.task.meters["seen"].targets})
    again = a_run(13, 4, workers=1)
    assert evaluate(again) == evaluate(again)
    found.append({**(evaluate(again, steps=1) or {}), "calls": 0, "targets": []})
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_gives_the_record_of_one(world: int) -> None:
    alone = records()
    together = run_ranks(records, world)
    for number, expected in enumerate(alone[:-1]):
        found = [rank[number] for rank in together]
        assert len({record.pop("calls") for record in found}) == 1
        assert all(repr(record) == repr(found[0]) for record in found)
        assert found[0]["samples"] == expected["samples"]
        assert found[0]["targets"] == expected["targets"]
        # Whole numbers are exact; the rest is sums of float64.
        for name in ("accuracy", "counted", "zeros", "f1", "top_2", "seen"):
            assert found[0].get(name) == expected.get(name), name
        for name in ("loss", "perplexity", "their_f1", "their_spearman"):
            assert found[0][name] == pytest.approx(expected[name], rel=1e-6, abs=1e-7, nan_ok=True), name
        assert list(found[0]) == [name for name in expected if name != "calls"]
    # The first step of an evaluation by several processes has a micro-batch of each.
    assert together[0][-1]["samples"] == min(13, 4 * world)


def ending(who: int, when: int) -> tuple[Any, int | None]:
    run = a_run(13, 1)
    forward = run.engine.model.forward

    def step(x: Tensor) -> Tensor:
        if distributed.rank() == who and run.engine.model.calls == when:
            run.signal = signal.SIGTERM
        return forward(x)

    run.engine.model.forward = step  # type: ignore[method-assign]
    return evaluate(run), run.ending


def endings() -> list[tuple[Any, int | None]]:
    last = -(-13 // distributed.world_size()) - 1
    return [ending(0, 1), ending(1, 0), ending(1, last)]


def test_a_signal_ends_an_evaluation_on_all_processes_or_on_none() -> None:
    for first, second, late in run_ranks(endings, 2):
        assert first == second == (None, signal.SIGTERM)
        # After the last step there is nothing left to end.
        assert late[0] is not None
        assert late[1] is None
