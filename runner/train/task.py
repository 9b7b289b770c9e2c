"""A task: how a batch becomes a loss and metrics. The only Python that most users write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from runner.errors import InputError, Problem

#: A metric of one batch: a 1-D tensor with one value a sample (their mean is reported), or a pair
#: (sum, count) of which sum(sum) / sum(count) over all batches and processes is reported.
Metric = Tensor | tuple[Tensor, Tensor | int]


class Task:
    """Turns a batch into model inputs, a loss and metrics.

    A batch is whatever the data's collate makes, with its tensors on the device. The default suits batches that
    are a pair (inputs, targets), such as those of `torch.utils.data.TensorDataset`.
    """

    #: Objects with update(predictions, targets), compute() and reset(), as in runner.metrics or torchmetrics:
    #: name -> object. What they compute is reported under their name by every evaluation.
    meters: Mapping[str, Any] = {}

    def inputs(self, batch: Any) -> Any:
        """What the model is called with: a tuple gives positional arguments, a dict keyword arguments."""
        return batch[0]

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """The SUM of the losses of what `weight` counts: a 0-d tensor that requires grad."""
        raise NotImplementedError(f"{type(self).__name__} has no loss(outputs, batch)")

    def weight(self, batch: Any) -> int | Tensor:
        """The denominator of the loss: how many samples (or tokens) this batch counts for."""
        inputs = batch[0]
        return inputs.shape[0]

    def metrics(self, outputs: Any, batch: Any) -> Mapping[str, Metric]:
        """What an evaluation reports beside the loss."""
        return {}

    def predictions(self, outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """(predictions, targets) for `meters`."""
        raise NotImplementedError(f"{type(self).__name__} has meters but no predictions(outputs, batch)")

    def scores(self, outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """(scores of all classes, targets) for those of `meters` that need them: top-k accuracy, perplexity."""
        raise NotImplementedError(f"{type(self).__name__} has meters of scores but no scores(outputs, batch)")

    def tokens(self, batch: Any) -> int | Tensor | None:
        """How many tokens the batch holds, for the throughput; None where that means nothing."""
        return None

    def check(self, dataset: Any, key: str) -> list[Problem]:
        """Problems of a data set (built, not yet read through) that can be told before a model exists."""
        return []


def checked_meters(meters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The meters of a task's argument. Raises InputError for what is no meter, before anything is trained."""
    problems = []
    for name, meter in (meters or {}).items():
        lacking = [method for method in ("reset", "update", "compute") if not hasattr(meter, method)]
        key = f"task.meters.{name}"
        if name in ("samples", "loss"):
            problems.append(Problem(key, "every evaluation reports that name itself", "choose another name"))
        elif lacking:
            why = f"is a {type(meter).__name__}, which has no {', '.join(lacking)}"
            problems.append(Problem(key, why, "say what to build, for example {_target_: runner.metrics.F1}"))
    if problems:
        raise InputError(*problems)
    return dict(meters or {})
