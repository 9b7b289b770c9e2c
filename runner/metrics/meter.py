"""What a meter is: it takes predictions batch by batch and computes one number of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Sums a tensor over all processes and returns the sum.
Total = Callable[[Tensor], Tensor]


class Meter:
    """Base of the meters here; a meter of one's own needs these methods and no base.

    Without `synchronise` it is given the predictions of all processes. With `needs_scores` it is given the scores of
    all classes (`Task.scores`) instead of the predicted class or value (`Task.predictions`).
    """

    needs_scores = False

    def reset(self) -> None:
        """Forgets everything."""
        raise NotImplementedError

    def update(self, predictions: Any, targets: Any) -> None:
        """Takes a batch."""
        raise NotImplementedError

    def synchronise(self, total: Total) -> None:
        """Adds up the counts of all processes; called once by all of them, before `compute`."""
        raise NotImplementedError

    def compute(self) -> float:
        """The number; not a number where nothing was counted."""
        raise NotImplementedError


def double(values: Tensor) -> Tensor:
    """The values as float64, on the CPU where the device has none."""
    return (values.cpu() if values.device.type == "mps" else values).detach().double()


def labels(predictions: Tensor, targets: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Predicted and true classes, both (n,); scores of shape (…, classes) become the class with the largest one."""
    if predictions.dim() == targets.dim() + 1:
        predictions = predictions.argmax(-1)
    if predictions.shape != targets.shape:
        raise ValueError(f"predictions {tuple(predictions.shape)} do not fit targets {tuple(targets.shape)}")
    predictions, targets = predictions.reshape(-1).long(), targets.reshape(-1).long()
    if ignore_index is None:
        return predictions, targets
    counted = targets != ignore_index
    return predictions[counted], targets[counted]


def room(tensor: Tensor, size: int) -> Tensor:
    """The tensor with its last dimension lengthened to `size` by zeros."""
    return torch.nn.functional.pad(tensor, (0, size - tensor.shape[-1]))
