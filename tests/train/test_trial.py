"""Trials before the training: what a look at an evaluation and the search for a size leave behind, which is nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from small import CLASSES, FEATURES, config, spec
from small import run as make_run
from torch import Tensor, nn

from runner.assemble import assemble, check, check_metrics
from runner.data.stream import StreamLoader, StreamOrder
from runner.data.synthetic import random_classification
from runner.errors import InputError
from runner.folder import RunFolder
from runner.tasks.classification import Classification
from runner.train.evaluate import evaluate
from runner.train.fit import fit_micro_size
from runner.train.run import Run
from runner.train.trial import trial

pytestmark = pytest.mark.usefixtures("quiet")


class Live:
    """24 rows; gives its state as it lives on, and goes on from where it stands."""

    def __init__(self) -> None:
        self.state = {"place": 0}
        self.data = random_classification(24, FEATURES, CLASSES)

    def __iter__(self) -> Iterator[Any]:
        while self.state["place"] < 24:
            self.state["place"] += 1
            yield self.data[self.state["place"] - 1]
        self.state["place"] = 0

    def state_dict(self) -> dict[str, int]:
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = state


class Draws(Classification):
    """Its metrics draw from all generators."""

    def metrics(self, outputs: Tensor, batch: Any) -> dict[str, Any]:
        random.random(), numpy.random.rand(), torch.rand(1)
        return {**super().metrics(outputs, batch), "drawn": outputs.new_zeros(len(outputs))}


class Counts(nn.Module):
    """Counts its passes, also in an evaluation, and has a buffer that nobody can write."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("wide", torch.full((1,), torch.nan).expand(5))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.last(x)


def generators() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())


def made(folder: Path, metric: str) -> Run:
    settings = config(
        hooks={"stop": spec("runner.hooks.early_stop.EarlyStop", metric=metric)},
        model=spec("train.test_trial.Counts"),
        task=spec("train.test_trial.Draws", num_classes=CLASSES),
        data__eval=spec("train.test_trial.Live"),
    )
    return assemble(settings, check(settings), RunFolder(folder), resume=None)


def test_the_look_at_the_metrics_leaves_all_as_it_was(tmp_path: Path) -> None:
    run = made(tmp_path, "drawn")
    before = generators()
    check_metrics(run)
    assert generators() == before
    assert dict(run.engine.model.named_buffers())["passes"] == 0
    assert run.eval_data is not None
    assert run.eval_data.dataset.state == {"place": 0}
    found = evaluate(run)
    assert found is not None
    assert found["samples"] == 24
    assert generators() != before


def test_a_metric_that_nobody_reports_is_still_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no evaluation reports it"):
        check_metrics(made(tmp_path, "drown"))


def test_the_search_for_a_size_reads_nothing_of_a_stream(tmp_path: Path) -> None:
    def loader() -> StreamLoader:
        return StreamLoader(Live(), StreamOrder(8), 8, trained=lambda: 0)

    run = make_run(tmp_path, model=Counts, eval_set=None, train_data=loader())
    before = generators()
    fit_micro_size(run)
    assert generators() == before
    assert run.engine.model.passes == 0
    for one, other in zip(run.train_data.steps(0, 5), loader().steps(0, 5), strict=True):
        assert torch.equal(one.batches[0][0], other.batches[0][0])


def test_what_is_no_number_and_sparse_comes_back() -> None:
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("nan", torch.tensor([torch.nan, 1.0]))
            self.register_buffer("sparse", torch.eye(3).to_sparse())
            self.register_buffer("short", torch.tensor(2.0, dtype=torch.bfloat16))

    model = Buffers()
    with trial(model, StreamLoader(Live(), StreamOrder(8), 8)):
        model.nan.data += 1
        model.sparse.copy_(2 * torch.eye(3).to_sparse())
        model.short.fill_(3)
    assert model.nan.tolist()[1] == 1.0
    assert torch.equal(model.sparse.to_dense(), torch.eye(3))
    assert model.short == 2.0
