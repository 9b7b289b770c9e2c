"""Writes a training record every log.every steps."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from runner.train.hook import Hook
from runner.train.run import Run


class MetricsLog(Hook):
    """Makes the record of a step out of its loss, the gauges and what was logged, and gives it to the trackers."""

    def on_step_end(self, run: Run) -> None:
        if not run.logging:
            return
        progress, loss = run.progress, run.loss
        assert loss is not None
        record: dict[str, Any] = {
            "split": "train",
            "step": progress.step,
            **_epoch(run),
            "samples": progress.samples,
            "loss": loss.item(),
        }
        for name, gauge in run.gauges.items():
            value = gauge()
            if value is not None:
                record[name] = value.item() if isinstance(value, Tensor) else value
        record["time"] = progress.seconds
        record["skipped_steps"] = progress.skipped
        for name, value in run.take_logged().items():
            record[name] = value.item() if isinstance(value, Tensor) else value
        run.record = record
        run.trackers.log(record)
        run.folder.heartbeat(step=progress.step)


def _epoch(run: Run) -> dict[str, float]:
    """Epochs seen, where the length of one is known."""
    length = run.train_data.order.samples_per_epoch
    return {"epoch": run.progress.samples / length} if math.isfinite(length) else {}
