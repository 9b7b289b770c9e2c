"""Evaluation: every held-out sample once, means by their true counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CLASSES, FEATURES
from small import run as make_run
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from runner.errors import InputError
from runner.tasks.classification import Classification
from runner.train.evaluate import Sums, evaluate
from runner.train.run import Run

pytestmark = pytest.mark.usefixtures("quiet")


def held_out(samples: int) -> TensorDataset:
    made = torch.Generator().manual_seed(5)
    return TensorDataset(
        torch.randn(samples, FEATURES, generator=made), torch.randint(CLASSES, (samples,), generator=made)
    )


@pytest.mark.parametrize("samples", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("micro", [1, 4])
def test_means_are_those_over_all_samples(tmp_path: Path, samples: int, micro: int) -> None:
    data = held_out(samples)
    run = make_run(tmp_path, eval_set=data, micro_size=micro)
    record = evaluate(run)
    with torch.no_grad():
        logits = run.engine.model(data.tensors[0])
    right = int((logits.argmax(-1) == data.tensors[1]).sum())
    assert record["samples"] == samples
    assert record["accuracy"] == right / samples
    assert record["loss"] == pytest.approx(cross_entropy(logits, data.tensors[1]).item(), rel=1e-6)
    assert list(record)[:2] == ["samples", "loss"]


class Pairs(Classification):
    """A pair, values a sample, several values a sample."""

    def metrics(self, outputs: Tensor, batch: Any) -> dict[str, Any]:
        labels = batch[1]
        return {
            "of_class_0": ((labels == 0).sum() * 3, (labels == 0).sum()),
            "counted": (labels.sum(), 2 * len(labels)),
            "label": labels,
            "square": torch.stack([labels, labels], 1) ** 2,
        }


def test_pairs_and_values_a_sample(tmp_path: Path) -> None:
    data = held_out(11)
    labels = data.tensors[1].double()
    record = evaluate(make_run(tmp_path, eval_set=data, micro_size=4, task=Pairs()))
    assert record["of_class_0"] == 3.0
    assert record["counted"] == labels.sum().item() / 22
    assert record["label"] == labels.mean().item()
    assert record["square"] == (labels**2).mean().item()


class Meter:
    """As torchmetrics has them; remembers what it saw."""

    def __init__(self, result: Any = 0.25) -> None:
        self.result, self.seen, self.resets = result, 0, 0

    def reset(self) -> None:
        self.seen, self.resets = 0, self.resets + 1

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        assert predictions.shape == targets.shape
        self.seen += len(predictions)

    def compute(self) -> Any:
        return self.result


def test_meters_are_reset_updated_and_computed(tmp_path: Path) -> None:
    meters = {"a": Meter(), "b": Meter(torch.tensor(0.5))}
    run = make_run(tmp_path, eval_set=held_out(11), micro_size=4, task=Classification(meters=meters))
    for number in (1, 2):
        record = evaluate(run)
        assert (record["a"], record["b"]) == (0.25, 0.5)
        assert meters["a"].seen == 11
        assert meters["a"].resets == number


def test_a_meter_that_gives_no_number_is_the_users_error(tmp_path: Path) -> None:
    run = make_run(tmp_path, task=Classification(meters={"a": Meter(torch.zeros(3))}))
    with pytest.raises(InputError) as caught:
        evaluate(run)
    assert "(3,)" in caught.value.problems[0].why


def test_sums_of_many_float32_keep_every_count() -> None:
    sums = Sums()
    for _ in range(3):
        sums.add("x", torch.tensor(16_777_216.0), 1)
        sums.add("x", torch.tensor(1.0), 0)
    assert sums.means() == {"x": (3 * 16_777_216 + 3) / 3}


def test_nothing_counted_is_not_a_number() -> None:
    sums = Sums()
    sums.add("recall", torch.tensor(0), torch.tensor(0))
    sums.add("other", 0.0, 0)
    assert all(math.isnan(value) for value in sums.means().values())


def test_evaluation_builds_no_graph_and_goes_through_every_context(tmp_path: Path) -> None:
    inside: list[bool] = []

    class Context:
        def __enter__(self) -> None:
            inside.append(True)

        def __exit__(self, *error: object) -> None:
            inside.append(False)

    class Look(Classification):
        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            assert inside == [True]
            assert not outputs.requires_grad
            return super().loss(outputs, batch)

    run: Run = make_run(tmp_path, task=Look())
    run.evaluation_contexts.append(Context)
    evaluate(run)
    assert inside == [True, False]
    assert run.engine.model.training


def test_an_error_inside_leaves_training_mode_and_contexts(tmp_path: Path) -> None:
    class Fails(Classification):
        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            raise ValueError("mine")

    run = make_run(tmp_path, task=Fails())
    with pytest.raises(ValueError, match="mine"):
        evaluate(run)
    assert run.engine.model.training
