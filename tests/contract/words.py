"""A task whose loss counts tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from runner.train.task import Task


class Words(Task):
    """Batches (ids, labels) of shape (texts, length); labels of -100 do not count."""

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return cross_entropy(outputs.flatten(0, 1), batch[1].flatten(), reduction="sum")

    def weight(self, batch: Any) -> Tensor:
        return (batch[1] != -100).sum()
