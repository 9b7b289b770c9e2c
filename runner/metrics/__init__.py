"""Metrics that an evaluation can report: counts that are added up exactly over any number of processes."""

from runner.metrics.classification import F1, Accuracy, MatthewsCorrelation, Precision, Recall, TopKAccuracy
from runner.metrics.language import Perplexity
from runner.metrics.meter import Meter
from runner.metrics.regression import R2, MeanAbsoluteError, MeanSquaredError, Pearson, RootMeanSquaredError

__all__ = [
    "F1",
    "R2",
    "Accuracy",
    "MatthewsCorrelation",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "Meter",
    "Pearson",
    "Perplexity",
    "Precision",
    "Recall",
    "RootMeanSquaredError",
    "TopKAccuracy",
]
