"""Classification: accuracy, precision, recall, F1, Matthews correlation, top-k accuracy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from runner.errors import wrong
from runner.metrics.meter import Meter, Total, labels, room


class _Tally(Meter):
    """Counts, for each class, of samples: predicted rightly, predicted at all, and truly of that class."""

    def __init__(self, ignore_index: int | None = None) -> None:
        self.ignore_index = ignore_index
        self._counts: Tensor | None = None

    def reset(self) -> None:
        self._counts = None

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        predicted, true = labels(predictions, targets, self.ignore_index)
        if not len(true):
            return
        largest = int(torch.maximum(predicted.max(), true.max()))
        # Room for a power of two of classes: a size that processes can agree on by adding.
        size = 1 << largest.bit_length()
        before = self._counts
        if before is not None:
            size = max(size, before.shape[1])
        right = predicted[predicted == true]
        counts = torch.stack([torch.bincount(found, minlength=size) for found in (right, predicted, true)])
        self._counts = counts if before is None else counts + room(before, size)

    def synchronise(self, total: Total) -> None:
        bits = torch.zeros(64, dtype=torch.int64)
        if self._counts is not None:
            bits[self._counts.shape[1].bit_length() - 1] = 1
        sizes = total(bits).nonzero().flatten().tolist()
        if not sizes:
            return
        size = 1 << sizes[-1]
        counts = torch.zeros(3, size, dtype=torch.int64) if self._counts is None else room(self._counts, size)
        self._counts = total(counts)

    @property
    def _numbers(self) -> tuple[list[int], list[int], list[int]]:
        """(right, predicted, true) of each class that was predicted or is true."""
        if self._counts is None:
            return [], [], []
        right, predicted, true = self._counts[:, self._counts[1:].any(0)].tolist()
        return right, predicted, true

    def _of(self, label: int) -> tuple[int, int, int]:
        """(right, predicted, true) of one class."""
        if self._counts is None or label >= self._counts.shape[1]:
            return 0, 0, 0
        right, predicted, true = self._counts[:, label].tolist()
        return right, predicted, true


class Accuracy(_Tally):
    """The part of all samples whose class was predicted.

    Args:
        ignore_index: targets of this number are left out.
    """

    def compute(self) -> float:
        right, _, true = self._numbers
        return sum(right) / sum(true) if true else math.nan


class _Averaged(_Tally):
    """A number of each class, averaged.

    Args:
        average: over the classes that were predicted or are true: `macro`, their mean; `weighted`, their mean
            weighted by how often each is true; `micro`, the number of their counts together; `binary`, the number of
            the class `positive` alone.
        positive: the class that `binary` is about.
        ignore_index: targets of this number are left out.
    """

    def __init__(self, average: str = "macro", positive: int = 1, ignore_index: int | None = None) -> None:
        super().__init__(ignore_index)
        if average not in ("macro", "weighted", "micro", "binary"):
            raise wrong("task.meters", "no such average", "one of macro, weighted, micro, binary", value=average)
        self.average, self.positive = average, positive

    def compute(self) -> float:
        right, predicted, true = self._numbers
        if not true:
            return math.nan
        if self.average == "binary":
            return self._one(*self._of(self.positive))
        if self.average == "micro":
            return self._one(sum(right), sum(predicted), sum(true))
        each = [self._one(*counts) for counts in zip(right, predicted, true, strict=True)]
        weights = true if self.average == "weighted" else [1] * len(each)
        return math.fsum(value * weight for value, weight in zip(each, weights, strict=True)) / sum(weights)

    def _one(self, right: int, predicted: int, true: int) -> float:
        raise NotImplementedError


class Precision(_Averaged):
    """The part of the predictions of a class that are right; 0 where it was never predicted."""

    def _one(self, right: int, predicted: int, true: int) -> float:
        return right / predicted if predicted else 0.0


class Recall(_Averaged):
    """The part of the samples of a class that were found; 0 where there is none."""

    def _one(self, right: int, predicted: int, true: int) -> float:
        return right / true if true else 0.0


class F1(_Averaged):
    """The harmonic mean of precision and recall; 0 where a class was neither predicted nor is true."""

    def _one(self, right: int, predicted: int, true: int) -> float:
        return 2 * right / (predicted + true) if predicted + true else 0.0


class MatthewsCorrelation(_Tally):
    """Matthews' correlation of predicted and true classes, for any number of them (Gorodkin, 2004).

    From -1 to 1; 0 where all predictions or all targets are of one class.

    Args:
        ignore_index: targets of this number are left out.
    """

    def compute(self) -> float:
        right, predicted, true = self._numbers
        if not true:
            return math.nan
        samples = sum(true)
        # Whole numbers of any size: nothing is rounded before the root.
        together = sum(right) * samples - sum(p * t for p, t in zip(predicted, true, strict=True))
        spread = (samples**2 - sum(p * p for p in predicted)) * (samples**2 - sum(t * t for t in true))
        return together / math.sqrt(spread) if spread else 0.0


class TopKAccuracy(Meter):
    """The part of the samples whose true class is among the `k` with the largest scores.

    Args:
        k: how many classes may be guessed.
        ignore_index: targets of this number are left out.
    """

    needs_scores = True

    def __init__(self, k: int = 5, ignore_index: int | None = None) -> None:
        if k < 1:
            raise wrong("task.meters", "at least one class is guessed", "k=5, for example", value=k)
        self.k, self.ignore_index = k, ignore_index
        self.reset()

    def reset(self) -> None:
        self._counts = torch.zeros(2, dtype=torch.int64)

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        if predictions.shape[:-1] != targets.shape:
            raise ValueError(f"scores {tuple(predictions.shape)} do not fit targets {tuple(targets.shape)}")
        best = predictions.topk(min(self.k, predictions.shape[-1]), -1).indices
        found = (best == targets.unsqueeze(-1)).any(-1)
        counted = torch.ones_like(found) if self.ignore_index is None else targets != self.ignore_index
        self._counts = self._counts.to(found.device) + torch.stack([(found & counted).sum(), counted.sum()])

    def synchronise(self, total: Total) -> None:
        self._counts = total(self._counts)

    def compute(self) -> float:
        found, count = self._counts.tolist()
        return found / count if count else math.nan
