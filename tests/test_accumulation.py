"""However a step is cut into micro-batches, it is the same step: the whole job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import FEATURES, Result, spec
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from runner.train.task import Task

Job = Callable[..., Result]


class Tokens(Task):
    """A label a token; -100 counts for nothing."""

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return cross_entropy(outputs.flatten(0, 1), batch[1].flatten(), reduction="sum", ignore_index=-100)

    def weight(self, batch: Any) -> Tensor:
        return (batch[1] != -100).sum()

    def tokens(self, batch: Any) -> Tensor:
        return self.weight(batch)


def sequences(samples: int, length: int = 6) -> TensorDataset:
    """Each sample has another number of tokens that count."""
    made = torch.Generator().manual_seed(4)
    labels = torch.randint(3, (samples, length), generator=made)
    labels[torch.arange(length) >= torch.randint(1, length + 1, (samples, 1), generator=made)] = -100
    return TensorDataset(torch.randn(samples, length, FEATURES, generator=made), labels)


def settings(task: str) -> dict[str, Any]:
    if task == "samples":
        return {}
    data = spec("test_accumulation.sequences", samples=50)
    return {"task": spec("test_accumulation.Tokens"), "data__train": data, "data__eval": data}


@pytest.mark.parametrize("task", ["samples", "tokens"])
def test_accumulation_changes_nothing(job: Job, task: str) -> None:
    """50 samples, 12 a step: the last step of each epoch has 2, and with 4 micro-batches of 3 only one of them."""
    results = [
        job(f"run{steps}", accumulation__steps=steps, batch__global_size=12, grad_clip=0.5, **settings(task))
        for steps in (1, 2, 4)
    ]
    one = results[0]
    assert len(one.losses) == 10
    for other in results[1:]:
        assert other.losses == pytest.approx(one.losses, rel=1e-6)
        norms = [[record["grad_norm"] for record in result.train] for result in (one, other)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-5)
        assert other.summary["metrics"]["loss"] == pytest.approx(one.summary["metrics"]["loss"], rel=1e-6)
        for name, value in one.watch.weights.items():
            torch.testing.assert_close(other.watch.weights[name], value, rtol=0, atol=1e-6)


def test_the_loss_of_a_record_is_the_mean_over_the_tokens_of_its_step(job: Job) -> None:
    from runner.data.order import Order

    result = job(
        accumulation__steps=3, batch__global_size=12, optimizer=spec("torch.optim.SGD", lr=0.0), **settings("tokens")
    )
    data, order = sequences(50), Order(50, 12, 0)
    torch.manual_seed(0)
    from small import mlp

    model = mlp()
    for record in result.train:
        chosen = order.indices(record["step"] - 1)
        outputs, labels = model(data.tensors[0][chosen]), data.tensors[1][chosen]
        mean = cross_entropy(outputs.flatten(0, 1), labels.flatten(), ignore_index=-100)
        assert record["loss"] == pytest.approx(mean.item(), rel=1e-6)
