"""Classification: cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from runner.errors import InputError, Problem
from runner.train.task import Metric, Task, checked_meters


class Classification(Task):
    """Batches (inputs, labels); the model gives logits of shape (batch, classes), labels are int64 (batch,).

    Args:
        num_classes: labels of a data set that shows them (`labels`, or the last of a TensorDataset's tensors)
            are checked against it before a model exists; and in any case against the model's first logits.
        meters: name -> meter, of runner.metrics or torchmetrics; reported by every evaluation beside the accuracy.
    """

    def __init__(self, num_classes: int | None = None, meters: Mapping[str, Any] | None = None) -> None:
        if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
            raise ValueError("num_classes must be a whole number, at least 1")
        self.num_classes = num_classes
        self.meters = checked_meters(meters)
        #: Largest label of each data set, until it is compared with the model's classes.
        self._largest: dict[str, int] = {}

    def logits(self, outputs: Any) -> Tensor:
        """The tensor of logits in what the model returns: itself, or its attribute `logits`."""
        return outputs if isinstance(outputs, Tensor) else outputs.logits

    def labels(self, batch: Any) -> Tensor:
        return batch[1]

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        logits = self.logits(outputs)
        if self._largest:
            self._compare(logits.shape[-1])
        return cross_entropy(logits, self.labels(batch), reduction="sum")

    def _compare(self, classes: int) -> None:
        """Raises InputError for labels that the model has no logit for: torch's own error names no data set."""
        problems = [
            Problem(
                key,
                f"its largest label is {label}, outside the {classes} classes 0 to {classes - 1} that the model knows",
                f"give the model {label + 1} classes, or mend the labels",
            )
            for key, label in self._largest.items()
            if label >= classes
        ]
        self._largest = {}
        if problems:
            raise InputError(*problems)

    def weight(self, batch: Any) -> int:
        return self.labels(batch).shape[0]

    def metrics(self, outputs: Any, batch: Any) -> Mapping[str, Metric]:
        return {"accuracy": self.logits(outputs).argmax(-1) == self.labels(batch)}

    def predictions(self, outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return self.logits(outputs).argmax(-1), self.labels(batch)

    def scores(self, outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return self.logits(outputs), self.labels(batch)

    def check(self, dataset: Any, key: str) -> list[Problem]:
        labels = getattr(dataset, "labels", None)
        if labels is None and getattr(dataset, "tensors", None):
            labels = dataset.tensors[-1]
        if labels is None:
            return []
        labels = torch.as_tensor(labels)
        if labels.numel() and not labels.is_floating_point():
            self._largest[key] = int(labels.max())
        if self.num_classes is None:
            return []
        outside = ((labels < 0) | (labels >= self.num_classes)).nonzero()
        if not len(outside):
            return []
        place = tuple(outside[0].tolist())
        return [
            Problem(
                key,
                f"label {int(labels[place])} of sample {place[0]} is outside the {self.num_classes} classes "
                f"0 to {self.num_classes - 1} ({len(outside)} such samples)",
                f"raise the model's and the task's number of classes to {int(labels.max()) + 1}, or mend the labels",
            )
        ]
