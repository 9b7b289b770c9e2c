"""Language modelling: perplexity."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from runner.metrics.meter import Meter, Total, double


class Perplexity(Meter):
    """exp of the mean cross-entropy (natural logarithm) over all tokens.

    Scores are (…, vocabulary) logits, targets (…) token numbers at the places that the scores predict.

    Args:
        ignore_index: targets of this number are left out.
    """

    needs_scores = True

    def __init__(self, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index
        self.reset()

    def reset(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64)

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        if predictions.shape[:-1] != targets.shape:
            raise ValueError(f"scores {tuple(predictions.shape)} do not fit targets {tuple(targets.shape)}")
        flat, scores = targets.reshape(-1), predictions.reshape(-1, predictions.shape[-1]).float()
        losses = cross_entropy(scores, flat, ignore_index=self.ignore_index, reduction="none")
        found = torch.stack([double(losses).sum(), double(flat != self.ignore_index).sum()])
        self._sums = self._sums.to(found.device) + found

    def synchronise(self, total: Total) -> None:
        self._sums = total(self._sums)

    def compute(self) -> float:
        loss, tokens = self._sums.tolist()
        if not tokens:
            return math.nan
        mean = loss / tokens
        return math.exp(mean) if mean < 700 else math.inf
