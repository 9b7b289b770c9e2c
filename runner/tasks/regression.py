"""Regression: mean squared error, mean absolute error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import mse_loss

from runner.train.task import Metric, Task, checked_meters


class Regression(Task):
    """Batches (inputs, targets); outputs and targets have the same number of values a sample.

    The loss is the mean over samples of the squared error summed over a sample's values.

    Args:
        meters: name -> meter, of runner.metrics or torchmetrics; reported by every evaluation.
    """

    def __init__(self, meters: Mapping[str, Any] | None = None) -> None:
        self.meters = checked_meters(meters)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return mse_loss(outputs, _shaped(batch[1], outputs), reduction="sum")

    def metrics(self, outputs: Any, batch: Any) -> Mapping[str, Metric]:
        return {"mean_absolute_error": (outputs - _shaped(batch[1], outputs)).abs().reshape(len(outputs), -1).mean(1)}

    def predictions(self, outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return outputs, _shaped(batch[1], outputs)


def _shaped(targets: Tensor, outputs: Tensor) -> Tensor:
    """Targets in the outputs' shape: (batch,) against (batch, 1) would broadcast to a square without a word."""
    return targets.to(outputs.dtype).reshape(outputs.shape)
