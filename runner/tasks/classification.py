"""Classification: cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from runner.errors import Problem
from runner.train.task import Metric, Task


class Classification(Task):
    """Batches (inputs, labels); the model gives logits of shape (batch, classes), labels are int64 (batch,).

    Args:
        num_classes: labels of a data set that shows them (`labels`, or the last of a TensorDataset's tensors)
            are checked against it before a model exists; None checks nothing.
        meters: name -> object with update(predictions, targets), compute() and reset().
    """

    def __init__(self, num_classes: int | None = None, meters: Mapping[str, Any] | None = None) -> None:
        self.num_classes = num_classes
        self.meters = dict(meters or {})

    def logits(self, outputs: Any) -> Tensor:
        """The tensor of logits in what the model returns: itself, or its attribute `logits`."""
        return outputs if isinstance(outputs, Tensor) else outputs.logits

    def labels(self, batch: Any) -> Tensor:
        return batch[1]

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return cross_entropy(self.logits(outputs), self.labels(batch), reduction="sum")

    def weight(self, batch: Any) -> int:
        return self.labels(batch).shape[0]

    def metrics(self, outputs: Any, batch: Any) -> Mapping[str, Metric]:
        return {"accuracy": self.logits(outputs).argmax(-1) == self.labels(batch)}

    def predictions(self, outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return self.logits(outputs).argmax(-1), self.labels(batch)

    def check(self, dataset: Any, key: str) -> list[Problem]:
        labels = getattr(dataset, "labels", None)
        if labels is None and getattr(dataset, "tensors", None):
            labels = dataset.tensors[-1]
        if self.num_classes is None or labels is None:
            return []
        labels = torch.as_tensor(labels)
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
