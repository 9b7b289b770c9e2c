"""Regression: mean squared and absolute errors, R², Pearson's correlation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from runner.metrics.meter import Meter, Total, double


class _MeanOverValues(Meter):
    """The mean over all values of what `_each` makes of the errors."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64)

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        errors = self._each(double(_alike(predictions, targets)) - double(targets))
        count = torch.tensor(errors.numel(), dtype=torch.float64, device=errors.device)
        self._sums = self._sums.to(errors.device) + torch.stack([errors.sum(), count])

    def _each(self, errors: Tensor) -> Tensor:
        raise NotImplementedError

    def synchronise(self, total: Total) -> None:
        self._sums = total(self._sums)

    def compute(self) -> float:
        found, count = self._sums.tolist()
        return found / count if count else math.nan


class MeanSquaredError(_MeanOverValues):
    """The mean over all values of the squared error."""

    def _each(self, errors: Tensor) -> Tensor:
        return errors**2


class RootMeanSquaredError(MeanSquaredError):
    """The root of the mean squared error."""

    def compute(self) -> float:
        return math.sqrt(super().compute())


class MeanAbsoluteError(_MeanOverValues):
    """The mean over all values of the absolute error."""

    def _each(self, errors: Tensor) -> Tensor:
        return errors.abs()


class _Moments(Meter):
    """Means and central second moments of predictions and targets, and the squared errors, for each column.

    Samples are (batch,) or (batch, columns…). Batches are merged by their central moments (Chan, Golub, LeVeque,
    1979): sums of squares would lose the digits of values far from 0.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._count = 0
        #: Rows: means of predictions and targets; their second moments; their product's; squared errors.
        self._rows: Tensor | None = None

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        if not targets.numel():
            return
        p, t = (double(x).reshape(len(targets), -1) for x in (_alike(predictions, targets), targets))
        mean_p, mean_t = p.mean(0), t.mean(0)
        p_off, t_off = p - mean_p, t - mean_t
        rows = [mean_p, mean_t, (p_off**2).sum(0), (t_off**2).sum(0), (p_off * t_off).sum(0), ((p - t) ** 2).sum(0)]
        there, count = torch.stack(rows), len(targets)
        if self._rows is not None:
            mean = (self._rows[:2] * self._count + there[:2] * count) / (self._count + count)
            there = _about(self._rows, self._count, mean) + _about(there, count, mean)
            there[:2] = mean
        self._rows, self._count = there, self._count + count

    def synchronise(self, total: Total) -> None:
        width = 0 if self._rows is None else self._rows.shape[1]
        widths, processes, count = total(torch.tensor([width, int(width > 0), self._count])).tolist()
        if not processes:
            return
        rows = torch.zeros(6, widths // processes, dtype=torch.float64) if self._rows is None else self._rows
        mean = total(rows[:2] * self._count) / count
        rows = total(_about(rows, self._count, mean.to(rows.device)))
        rows[:2] = mean
        self._rows, self._count = rows, count


def _about(rows: Tensor, count: int, mean: Tensor) -> Tensor:
    """The moments of `count` samples about another mean."""
    p, t = rows[:2] - mean
    moved = rows.clone()
    moved[2] += count * p * p
    moved[3] += count * t * t
    moved[4] += count * p * t
    return moved


class R2(_Moments):
    """1 - squared errors / squared deviations of the targets from their mean; the mean over columns.

    Where all targets are alike: 1 for predictions without an error, else 0. Not a number for fewer than two samples.
    """

    def compute(self) -> float:
        if self._rows is None or self._count < 2:
            return math.nan
        spread, errors = self._rows[3], self._rows[5]
        alike = (errors == 0).double()
        return float(torch.where(spread > 0, 1 - errors / spread.clamp(min=1e-300), alike).mean())


class Pearson(_Moments):
    """Pearson's correlation of predictions and targets; the mean over columns.

    Not a number where predictions or targets are all alike, or for fewer than two samples.
    """

    def compute(self) -> float:
        if self._rows is None or self._count < 2:
            return math.nan
        _, _, p, t, both, _ = self._rows
        return float((both / (p.sqrt() * t.sqrt())).clamp(-1, 1).mean())


def _alike(predictions: Tensor, targets: Tensor) -> Tensor:
    """The predictions, once they are known to have the targets' shape: others would broadcast without a word."""
    if predictions.shape != targets.shape:
        raise ValueError(f"predictions {tuple(predictions.shape)} do not fit targets {tuple(targets.shape)}")
    return predictions
