"""The built-in tasks: losses as sums, metrics, and what their checks find."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from runner.errors import InputError
from runner.metrics import MeanSquaredError
from runner.tasks.classification import Classification
from runner.tasks.regression import Regression

pytestmark = pytest.mark.usefixtures("quiet")


def test_classification() -> None:
    task, logits = Classification(), torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 0.0]])
    batch = [torch.zeros(3, 4), torch.tensor([0, 1, 1])]
    assert task.loss(logits, batch).item() == pytest.approx(3 * cross_entropy(logits, batch[1]).item())
    assert task.loss(logits, batch).dim() == 0
    assert task.weight(batch) == 3
    assert task.metrics(logits, batch)["accuracy"].tolist() == [True, False, True]
    predictions, targets = task.predictions(logits, batch)
    assert (predictions.tolist(), targets.tolist()) == ([0, 2, 1], [0, 1, 1])


def test_models_that_give_an_output_with_logits() -> None:
    logits, batch = torch.eye(3), [torch.zeros(3, 1), torch.arange(3)]
    output = SimpleNamespace(logits=logits)
    assert Classification().loss(output, batch) == Classification().loss(logits, batch)


def labelled(labels: Any) -> TensorDataset:
    labels = torch.as_tensor(labels)
    return TensorDataset(torch.zeros(len(labels), 2), labels)


def test_a_label_outside_the_classes_is_a_problem_before_a_model_exists() -> None:
    (problem,) = Classification(3).check(labelled([0, 1, 3, 2, 7]), "data.train")
    assert problem.key == "data.train"
    assert problem.why == "label 3 of sample 2 is outside the 3 classes 0 to 2 (2 such samples)"
    assert "to 8" in problem.fix
    (problem,) = Classification(3).check(labelled([0, -1]), "data.eval")
    assert problem.why == "label -1 of sample 1 is outside the 3 classes 0 to 2 (1 such samples)"


def test_labels_of_several_values_a_sample() -> None:
    (problem,) = Classification(3).check(labelled([[0, 1], [2, 3]]), "data.train")
    assert problem.why.startswith("label 3 of sample 1 is outside")


@pytest.mark.parametrize(
    "data",
    [
        labelled([0, 1, 2]),
        SimpleNamespace(labels=[0, 1, 2]),
        SimpleNamespace(labels=None),
        SimpleNamespace(),
        [(torch.zeros(2), 9)],
    ],
)
def test_good_labels_and_labels_that_cannot_be_seen(data: Any) -> None:
    assert Classification(3).check(data, "data.train") == []


def test_nothing_is_checked_without_a_number_of_classes() -> None:
    assert Classification().check(labelled([99]), "data.train") == []


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3)])
def test_regression(shape: tuple[int, ...]) -> None:
    outputs, targets = torch.randn(shape), torch.randn(shape)
    batch = [torch.zeros(4, 2), targets]
    task = Regression()
    assert task.loss(outputs, batch).item() == pytest.approx(((outputs - targets) ** 2).sum().item(), rel=1e-6)
    assert task.weight(batch) == 4
    error = task.metrics(outputs, batch)["mean_absolute_error"]
    assert error.shape == (4,)
    torch.testing.assert_close(error, (outputs - targets).abs().reshape(4, -1).mean(1))


def test_targets_without_the_last_dimension_do_not_broadcast() -> None:
    outputs, targets = torch.tensor([[1.0], [2.0]]), torch.tensor([1, 4])
    batch = [torch.zeros(2, 2), targets]
    assert Regression().loss(outputs, batch).item() == 4.0
    predictions, shaped = Regression().predictions(outputs, batch)
    assert predictions.shape == shaped.shape == (2, 1)


def test_meters_are_kept_by_name() -> None:
    meter = MeanSquaredError()
    for task in (Classification(meters={"a": meter}), Regression(meters={"a": meter})):
        assert task.meters == {"a": meter}
    assert Regression().meters == {}
    assert isinstance(Classification().loss(torch.zeros(1, 2), [None, torch.tensor([0])]), Tensor)


@pytest.mark.parametrize("kind", [Classification, Regression])
def test_what_is_no_meter_is_told_before_the_training(kind: Any) -> None:
    with pytest.raises(InputError) as caught:
        kind(meters={"f1": {"average": "macro"}, "loss": MeanSquaredError(), "good": MeanSquaredError()})
    first, second = caught.value.problems
    assert (first.key, first.why) == ("task.meters.f1", "is a dict, which has no reset, compute")
    assert "_target_" in first.fix
    assert second.key == "task.meters.loss"


def test_scores_are_the_logits() -> None:
    logits, batch = torch.eye(3), [torch.zeros(3, 1), torch.arange(3)]
    scores, targets = Classification().scores(SimpleNamespace(logits=logits), batch)
    assert scores is logits
    assert targets is batch[1]
    with pytest.raises(NotImplementedError, match="scores"):
        Regression().scores(logits, batch)
