"""Evaluation: every held-out sample once, sums and counts kept on the device until the end."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from runner import distributed
from runner.data.loader import to_device
from runner.errors import wrong
from runner.heartbeat import EVALUATION
from runner.signals import Interrupted
from runner.train.run import Run


def evaluate(run: Run, steps: int | None = None) -> dict[str, Any] | None:
    """Loss and metrics over the held-out data (or its first `steps` steps), as a record without its step.

    The record is the same on all processes. None on all of them where a signal asked for the end meanwhile.
    """
    assert run.eval_data is not None
    model, order = run.engine.model, run.eval_data.order
    was_training = model.training
    sums, meters = ExactSums() if run.engine.shards else Sums(), Meters(run)
    done = 0
    beat, step = run.heartbeat.beat, run.progress.step
    with ExitStack() as stack:
        for context in run.evaluation_contexts:
            stack.enter_context(context())
        stack.enter_context(torch.no_grad())
        model.eval()
        try:
            for batches, real in run.eval_data.steps(0, steps or order.steps_per_epoch):
                beat(EVALUATION, step)
                if run.ends_now():
                    return None
                shown = [_one(run, batch, sums, meters) for batch in batches[:real]]
                for batch in batches[real:]:
                    # Layers may wait for other processes: a batch that only fills up goes through the model as well.
                    run.engine.forward(run.task.inputs(batch))
                meters.update(shown)
                done += 1
        except Interrupted:
            if steps is not None:
                raise  # a look before the training: nothing is lost, and nobody asks
            # While data were waited for; the other processes hear of it where they look as well.
            run.ends_now()
            return None
        finally:
            model.train(was_training)
    return {"samples": order.samples(done), **sums.means(), **meters.results()}


def _one(run: Run, batch: Any, sums: Sums, meters: Meters) -> Any:
    """One micro-batch: adds its sums, gives what meters are shown of it."""
    task = run.task
    outputs = run.engine.forward(task.inputs(batch))
    sums.add("loss", task.loss(outputs, batch), task.weight(batch))
    for name, value in task.metrics(outputs, batch).items():
        if isinstance(value, tuple):
            sums.add(name, *value)
        else:
            sums.add(name, value.sum(), value.numel())
    return meters.shown(outputs, batch)


class Sums:
    """Sums and counts by name; they are added up over the processes, and the means read, once, at the end."""

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
        """The mean of each name over all processes."""
        numbers = {name: (_number(total), _number(count)) for name, (total, count) in self._sums.items()}
        if distributed.world_size() > 1:
            numbers = self._together(numbers)
        return {name: total / count if count else math.nan for name, (total, count) in numbers.items()}

    def _together(self, numbers: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        # A process without samples knows no names, and a task may report some for some batches only.
        names = list(dict.fromkeys(name for found in distributed.gather(list(numbers)) for name in found))
        here = torch.tensor([numbers.get(name, (0.0, 0.0)) for name in names], dtype=torch.float64)
        return dict(zip(names, distributed.total(here).tolist(), strict=True)) if names else {}


class ExactSums(Sums):
    """Sums that are rounded once, at the end: whose numbers they are, and in which order, makes no difference."""

    def add(self, name: str, total: Any, count: Any) -> None:
        totals, counts = self._sums.setdefault(name, [[], []])
        totals.append(total)
        counts.append(count)

    def means(self) -> dict[str, float]:
        here = {name: [list(map(_number, column)) for column in columns] for name, columns in self._sums.items()}
        everywhere = distributed.gather(here)
        found: dict[str, float] = {}
        for name in dict.fromkeys(name for numbers in everywhere for name in numbers):
            total, count = (
                _exact([value for numbers in everywhere if name in numbers for value in numbers[name][column]])
                for column in (0, 1)
            )
            found[name] = total / count if count else math.nan
        return found


def _exact(values: list[float]) -> float:
    """The sum, rounded once."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


class Meters:
    """The task's meters over an evaluation by any number of processes.

    One with `synchronise(total)` adds up its own counts at the end, torchmetrics' do so when they compute, and any
    other sees the predictions of all processes, in the order in which one process would have made them.
    """

    def __init__(self, run: Run) -> None:
        self._task = run.task
        self._device = run.engine.device
        self._alone = run.engine.mesh.data_size == 1
        self._canonical = bool(run.engine.shards)
        #: Those that take what this process predicts, and those that take what all do.
        self._own: list[Any] = []
        self._of_all: list[Any] = []
        for meter in self._task.meters.values():
            meter.reset()
            if _of_torchmetrics(meter):
                meter.to(self._device)
            # Sums of several processes' sums are rounded otherwise than one process's: canonical ones see all.
            alone = self._alone or _of_torchmetrics(meter) or (not self._canonical and hasattr(meter, "synchronise"))
            (self._own if alone else self._of_all).append(meter)
        self._kinds = {_needs_scores(meter) for meter in (*self._own, *self._of_all)}

    def shown(self, outputs: Any, batch: Any) -> dict[bool, tuple[Any, Any]]:
        """What meters are shown of a batch: (scores, targets) under True, (predictions, targets) under False."""
        task = self._task
        return {kind: (task.scores if kind else task.predictions)(outputs, batch) for kind in self._kinds}

    def update(self, shown: Sequence[dict[bool, tuple[Any, Any]]]) -> None:
        """Takes what was shown of this process's micro-batches of a step."""
        for pairs in shown:
            for meter in self._own:
                meter.update(*pairs[_needs_scores(meter)])
        if not self._of_all:
            return
        # By way of the CPU: objects travel there.
        everywhere = distributed.gather([to_device(pairs, torch.device("cpu")) for pairs in shown])
        for place in range(max(map(len, everywhere))):
            for found in everywhere:
                for pairs in to_device(found[place : place + 1], self._device):
                    for meter in self._of_all:
                        meter.update(*pairs[_needs_scores(meter)])

    def results(self) -> dict[str, float]:
        """What the meters compute; one that computes a mapping gives a value for each of its keys."""
        found: dict[str, float] = {}
        for name, meter in self._task.meters.items():
            if not self._alone and not self._canonical and hasattr(meter, "synchronise"):
                meter.synchronise(self._total)
            value = meter.compute()
            values = (
                {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, Mapping) else {name: value}
            )
            found.update({key: _number(item) for key, item in values.items()})
        return found

    def _total(self, counts: Tensor) -> Tensor:
        # A process without samples has its counts elsewhere than the others. Gloo, which MPS goes by, has the CPU only.
        return distributed.total(counts.to("cpu" if self._device.type == "mps" else self._device))


def _needs_scores(meter: Any) -> bool:
    return getattr(meter, "needs_scores", False) is True


def _of_torchmetrics(meter: Any) -> bool:
    """Whether a meter is of the package torchmetrics, which is imported only where a configuration names it."""
    package = sys.modules.get("torchmetrics")
    return package is not None and isinstance(meter, (package.Metric, package.MetricCollection))


def _number(value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise wrong(
            "task.meters", f"a meter computed a tensor of shape {tuple(value.shape)}", "give one that computes a number"
        )
    return value.item() if isinstance(value, Tensor) else value
