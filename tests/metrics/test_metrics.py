"""The meters against torchmetrics, against formulas written out, and over several processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from processes import run_ranks
from torch import Tensor

from runner import distributed
from runner.errors import InputError
from runner.metrics import (
    F1,
    R2,
    Accuracy,
    MatthewsCorrelation,
    MeanAbsoluteError,
    MeanSquaredError,
    Meter,
    Pearson,
    Perplexity,
    Precision,
    Recall,
    RootMeanSquaredError,
    TopKAccuracy,
)

pytestmark = pytest.mark.usefixtures("quiet")

Batch = tuple[Tensor, Tensor]


def labelled(samples: int, classes: int, seed: int, right: float = 0.5) -> Batch:
    made = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (samples,), generator=made)
    guesses = torch.randint(classes, (samples,), generator=made)
    return torch.where(torch.rand(samples, generator=made) < right, targets, guesses), targets


def measured(meter: Any, predictions: Tensor, targets: Tensor, size: int = 7) -> float:
    meter.reset()
    for p, t in zip(predictions.split(size), targets.split(size), strict=True):
        meter.update(p, t)
    return meter.compute()


# --- against torchmetrics ---------------------------------------------------------------------------------------------


def pairs_of_classification(classes: int) -> Iterator[tuple[Meter, Any]]:
    from torchmetrics import classification as other

    kinds: dict[str, tuple[Callable[..., Meter], Any]] = {
        "f1": (F1, other.MulticlassF1Score),
        "precision": (Precision, other.MulticlassPrecision),
        "recall": (Recall, other.MulticlassRecall),
    }
    for ours, theirs in kinds.values():
        for average in ("macro", "micro", "weighted"):
            yield ours(average=average), theirs(classes, average=average)
    yield Accuracy(), other.MulticlassAccuracy(classes, average="micro")
    yield MatthewsCorrelation(), other.MulticlassMatthewsCorrCoef(classes)
    if classes == 2:
        yield F1(average="binary"), other.BinaryF1Score()
        yield Precision(average="binary"), other.BinaryPrecision()
        yield Recall("binary"), other.BinaryRecall()
        yield MatthewsCorrelation(), other.BinaryMatthewsCorrCoef()


@pytest.mark.parametrize(("classes", "samples"), [(2, 40), (3, 101), (10, 25), (5, 1)])
def test_classification_is_what_torchmetrics_computes(classes: int, samples: int) -> None:
    for ours, theirs in pairs_of_classification(classes):
        predictions, targets = labelled(samples, classes, seed=classes)
        expected = theirs(predictions, targets).item()
        assert measured(ours, predictions, targets) == pytest.approx(expected, abs=1e-6), type(ours).__name__


def test_ignored_targets_are_left_out() -> None:
    from torchmetrics.classification import MulticlassF1Score

    predictions, targets = labelled(60, 4, seed=1)
    targets[::5] = -100
    theirs = MulticlassF1Score(4, average="macro", ignore_index=-100)
    expected = theirs(predictions, targets).item()
    assert measured(F1(ignore_index=-100), predictions, targets) == pytest.approx(expected, abs=1e-6)
    kept = targets != -100
    for kind in (Accuracy, MatthewsCorrelation, Recall):
        assert measured(kind(ignore_index=-100), predictions, targets) == measured(
            kind(), predictions[kept], targets[kept]
        )


@pytest.mark.parametrize("shape", [(50,), (50, 1), (50, 3)])
def test_regression_is_what_torchmetrics_computes(shape: tuple[int, ...]) -> None:
    import torchmetrics

    made = torch.Generator().manual_seed(0)
    targets = torch.randn(shape, generator=made) * 3 + 100
    predictions = targets + torch.randn(shape, generator=made)
    flat = [x.reshape(50, -1).squeeze(1) for x in (predictions.double(), targets.double())]
    columns = math.prod(shape[1:])
    pairs: list[tuple[Meter, Any]] = [
        (MeanSquaredError(), torchmetrics.MeanSquaredError()),
        (RootMeanSquaredError(), torchmetrics.MeanSquaredError(squared=False)),
        (MeanAbsoluteError(), torchmetrics.MeanAbsoluteError()),
        (R2(), torchmetrics.R2Score()),
        (Pearson(), torchmetrics.PearsonCorrCoef(num_outputs=columns)),
    ]
    for ours, theirs in pairs:
        theirs = theirs.set_dtype(torch.float64)
        theirs.update(*flat)
        expected = theirs.compute().mean().item()
        assert measured(ours, predictions, targets) == pytest.approx(expected, rel=1e-6), type(ours).__name__


def test_scores_are_what_torchmetrics_computes() -> None:
    from torchmetrics.classification import MulticlassAccuracy
    from torchmetrics.text import Perplexity as TheirPerplexity

    made = torch.Generator().manual_seed(0)
    scores, targets = torch.randn(6, 9, 11, generator=made), torch.randint(11, (6, 9), generator=made)
    targets[2, 4:] = -100
    theirs = TheirPerplexity(ignore_index=-100)
    assert measured(Perplexity(), scores, targets, 2) == pytest.approx(theirs(scores, targets).item(), rel=1e-5)
    flat, kept = scores.reshape(-1, 11), targets.reshape(-1)
    flat, kept = flat[kept >= 0], kept[kept >= 0]
    for k in (1, 3, 11):
        expected = MulticlassAccuracy(11, top_k=k, average="micro")(flat, kept).item()
        assert measured(TopKAccuracy(k), flat, kept) == pytest.approx(expected, abs=1e-7)
        assert measured(TopKAccuracy(k, ignore_index=-100), scores, targets, 2) == measured(TopKAccuracy(k), flat, kept)
    assert measured(TopKAccuracy(50), flat, kept) == 1.0


# --- by hand ----------------------------------------------------------------------------------------------------------

#: Class 0: 2 of 3 found, 3 predicted. Class 1: 1 of 2 found, 2 predicted. Class 3: 0 of 1; class 2 was predicted once.
PREDICTED, TRUE = torch.tensor([0, 0, 1, 1, 0, 2]), torch.tensor([0, 0, 0, 1, 1, 3])


def test_numbers_by_hand() -> None:
    assert measured(Accuracy(), PREDICTED, TRUE) == 3 / 6
    assert measured(Precision(), PREDICTED, TRUE) == pytest.approx((2 / 3 + 1 / 2 + 0 + 0) / 4, abs=1e-15)
    assert measured(Recall("weighted"), PREDICTED, TRUE) == pytest.approx((3 * (2 / 3) + 2 * (1 / 2) + 0) / 6)
    assert measured(F1("binary"), PREDICTED, TRUE) == 2 * 1 / (2 + 2)
    assert measured(F1("binary", positive=0), PREDICTED, TRUE) == 2 * 2 / (3 + 3)
    assert measured(F1("binary", positive=9), PREDICTED, TRUE) == 0.0
    assert measured(F1("micro"), PREDICTED, TRUE) == measured(Accuracy(), PREDICTED, TRUE)
    together, spread = 3 * 6 - (3 * 3 + 2 * 2 + 0 + 0), (36 - 9 - 4 - 1) * (36 - 9 - 4 - 1)
    assert measured(MatthewsCorrelation(), PREDICTED, TRUE) == together / math.sqrt(spread)


def test_logits_become_classes() -> None:
    logits = torch.nn.functional.one_hot(PREDICTED, 4).float()
    assert measured(F1(), logits, TRUE) == measured(F1(), PREDICTED, TRUE)


def test_edges() -> None:
    ones = torch.ones(4, dtype=torch.int64)
    assert measured(MatthewsCorrelation(), ones, ones) == 0.0
    assert measured(F1("binary"), 0 * ones, 0 * ones) == 0.0
    assert measured(R2(), ones, ones) == 1.0
    assert measured(R2(), 0 * ones, ones) == 0.0
    assert math.isnan(measured(Pearson(), ones, torch.arange(4)))
    assert measured(Perplexity(), torch.tensor([[0.0, -5000.0]]), torch.tensor([1])) == math.inf
    for meter in every_meter():
        meter.reset()
        assert math.isnan(meter.compute())


def test_no_digit_is_lost_far_from_zero() -> None:
    targets = torch.arange(1000, dtype=torch.float64) / 1000 + 1e7
    predictions = targets + torch.sin(torch.arange(1000, dtype=torch.float64))
    spread = ((targets - targets.mean()) ** 2).sum()
    expected = 1 - ((predictions - targets) ** 2).sum() / spread
    assert measured(R2(), predictions, targets) == pytest.approx(expected.item(), rel=1e-8)
    assert measured(Pearson(), targets, targets) == pytest.approx(1.0, abs=1e-9)


def test_shapes_that_would_broadcast_are_refused() -> None:
    for meter in (MeanSquaredError(), R2(), Accuracy(), TopKAccuracy()):
        with pytest.raises(ValueError, match="do not fit"):
            meter.update(torch.zeros(3), torch.zeros(4, dtype=torch.int64))


def test_arguments_that_mean_nothing() -> None:
    for call in (lambda: F1("mean"), lambda: TopKAccuracy(0)):
        with pytest.raises(InputError):
            call()


# --- several processes ------------------------------------------------------------------------------------------------


def every_meter() -> list[Meter]:
    averaged: list[Meter] = [
        kind(average) for kind in (F1, Precision, Recall) for average in ("macro", "micro", "weighted", "binary")
    ]
    return [
        *averaged,
        Accuracy(),
        MatthewsCorrelation(),
        TopKAccuracy(2),
        Perplexity(),
        MeanSquaredError(),
        RootMeanSquaredError(),
        MeanAbsoluteError(),
        R2(),
        Pearson(),
    ]


def a_batch(meter: Meter, samples: int) -> Batch:
    if meter.needs_scores:
        made = torch.Generator().manual_seed(samples)
        return torch.randn(samples, 5, generator=made), torch.randint(5, (samples,), generator=made)
    predictions, targets = labelled(samples, 3 if samples < 20 else 70, samples)
    if isinstance(meter, (MeanSquaredError, MeanAbsoluteError, R2, Pearson)):
        return predictions.double().reshape(-1, 1), targets.double().reshape(-1, 1)
    return predictions, targets


def synchronised(lengths: list[int]) -> list[list[float]]:
    """Each meter's result of each length, where this process saw every world-th sample."""
    rank, world = distributed.rank(), distributed.world_size()
    found = []
    for samples in lengths:
        for meter in every_meter():
            predictions, targets = a_batch(meter, samples)
            meter.reset()
            for i in range(rank, samples, world):
                meter.update(predictions[i : i + 1], targets[i : i + 1])
            meter.synchronise(distributed.total)
            found.append(meter.compute())
    return [found]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_compute_what_one_does(world: int) -> None:
    lengths = [0, 1, 2, 5, 40]
    expected = [measured(meter, *a_batch(meter, n), size=4) for n in lengths for meter in every_meter()]
    names = [(n, type(meter).__name__) for n in lengths for meter in every_meter()]
    results = [found for (found,) in run_ranks(synchronised, world, lengths)]
    for number, (name, wanted) in enumerate(zip(names, expected, strict=True)):
        assert all(repr(result[number]) == repr(results[0][number]) for result in results), name
        exact = 0.0 if name[1] not in ("R2", "Pearson", "Perplexity") else 1e-12
        assert results[0][number] == pytest.approx(wanted, rel=exact, abs=exact, nan_ok=True), name
