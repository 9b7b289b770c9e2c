"""Evaluation: every held-out sample once, sums and counts kept on the device until the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from runner.errors import wrong
from runner.train.run import Run


def evaluate(run: Run, steps: int | None = None) -> dict[str, Any] | None:
    """Loss and metrics over the held-out data (or its first `steps` steps), as a record without its step.

    None where a signal asked for the end meanwhile.
    """
    assert run.eval_data is not None
    model = run.engine.model
    was_training = model.training
    sums = Sums()
    meters = run.task.meters
    for meter in meters.values():
        meter.reset()
    with ExitStack() as stack:
        for context in run.evaluation_contexts:
            stack.enter_context(context())
        stack.enter_context(torch.no_grad())
        model.eval()
        try:
            for batches in run.eval_data.steps(0, steps or run.eval_data.order.steps_per_epoch):
                if run.signal is not None:
                    return None
                for batch in batches:
                    _one(run, batch, sums, meters)
        finally:
            model.train(was_training)
    record = {"samples": run.eval_data.order.samples_per_epoch, **sums.means()}
    for name, meter in meters.items():
        record[name] = _number(meter.compute())
    return record


def _one(run: Run, batch: Any, sums: Sums, meters: Mapping[str, Any]) -> None:
    task = run.task
    outputs = run.engine.forward(task.inputs(batch))
    sums.add("loss", task.loss(outputs, batch), task.weight(batch))
    for name, value in task.metrics(outputs, batch).items():
        if isinstance(value, tuple):
            sums.add(name, *value)
        else:
            sums.add(name, value.sum(), value.numel())
    if meters:
        predictions, targets = task.predictions(outputs, batch)
        for meter in meters.values():
            meter.update(predictions, targets)


class Sums:
    """Sums and counts by name; the means are read once, at the end."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Any]] = {}

    def add(self, name: str, total: Any, count: Any) -> None:
        # float64 where the device has it: sums over a large set then keep every count.
        if isinstance(total, Tensor) and total.device.type != "mps":
            total = total.double()
        entry = self._sums.setdefault(name, [0, 0])
        entry[0] = entry[0] + total
        entry[1] = entry[1] + count

    def means(self) -> dict[str, float]:
        numbers = {name: (_number(total), _number(count)) for name, (total, count) in self._sums.items()}
        return {name: total / count if count else math.nan for name, (total, count) in numbers.items()}


def _number(value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise wrong(
            "task.meters", f"a meter computed a tensor of shape {tuple(value.shape)}", "give one that computes a number"
        )
    return value.item() if isinstance(value, Tensor) else value
