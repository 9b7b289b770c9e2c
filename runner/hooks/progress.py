"""Shows how a run goes: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner import console
from runner.train.hook import Hook
from runner.train.run import Run

#: Of an evaluation's record in the live line: its loss would be taken for the training's.
_NOT_SHOWN = ("split", "step", "samples", "loss")
_MORE = {"lr": ".3g", "grad_norm": ".3g", "tokens_per_second": ".0f"}


class Progress(Hook):
    """Loss, metrics, samples a second and time left.

    On a terminal a live line, redrawn at most `per_second` times a second and cut to its width; in a pipe or a file
    one flushed line for each training record.

    Args:
        seconds: least time between two plain lines; records in between get none.
        per_second: how often the live line is redrawn at most.
    """

    def __init__(self, seconds: float = 0.0, per_second: float = 10.0) -> None:
        self._seconds, self._pause = seconds, 1.0 / per_second
        self._live = False
        self._next = 0.0
        self._shown = -1

    def on_run_start(self, run: Run) -> None:
        # A terminal that cannot move its cursor gets plain lines.
        self._live = sys.stdout is not None and sys.stdout.isatty() and run.terminal != "dumb"
        self._started, self._first = time.perf_counter(), run.progress.step

    def on_step_end(self, run: Run) -> None:
        if self._live:
            now = time.perf_counter()
            if now >= self._next:
                self._next = now + self._pause
                console.live_line.draw(self._line(run, live=True))
            return
        if run.record.get("step") == self._shown or not run.record:
            return
        now = time.perf_counter()
        if now >= self._next:
            self._next = now + self._seconds
            self._shown = run.record["step"]
            self._print(self._line(run))

    def on_eval_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "samples")
        self._print(f"evaluation at step {run.progress.step}: {values}  ({metrics['samples']} samples)")

    def on_checkpoint_saved(self, run: Run, path: Path) -> None:
        if self._live:
            console.live_line.draw(f"saved {path}")

    def on_run_end(self, run: Run) -> None:
        if run.record and run.record.get("step") != self._shown:
            self._print(self._line(run))
        console.live_line.clear()

    def on_exception(self, run: Run, error: BaseException) -> None:
        console.live_line.leave()

    def _line(self, run: Run, live: bool = False) -> str:
        plan, record = run.plan, run.record
        step = run.progress.step if live else record["step"]
        epochs = -(-plan.steps // plan.steps_per_epoch)
        parts = [f"step {step:>{len(str(plan.steps))}}/{plan.steps}"]
        if epochs > 1 and not live:
            parts.append(f"epoch {record['samples'] / run.train_data.order.samples_per_epoch:.2f}/{epochs}")
        # Reading the step's own loss costs nothing on a CPU and waits for any other device.
        loss = run.loss if live and run.engine.device.type == "cpu" else record.get("loss")
        if loss is not None:
            parts.append(f"loss {float(loss):.4f}")
        if live:
            parts += [f"{name} {value:.4f}" for name, value in run.metrics.items() if name not in _NOT_SHOWN]
        rate = record.get("samples_per_second", 0.0)
        parts += _values(record, {"samples_per_second": ".1f" if rate < 1000 else ".0f"})
        left = self._left(run, step)
        if left is not None:
            parts.append(f"left {left}")
        # What a narrow terminal cuts off comes last.
        return "  ".join([*parts, *_values(record, _MORE)])

    def _left(self, run: Run, step: int) -> str | None:
        done = step - self._first
        if done <= 0 or step >= run.plan.steps:
            return None
        seconds = (time.perf_counter() - self._started) / done * (run.plan.steps - step)
        minutes, second = divmod(round(seconds), 60)
        hours, minute = divmod(minutes, 60)
        return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"

    def _print(self, line: str) -> None:
        # By the logger, which also keeps it in the run's logs; it clears the live line.
        console.log.info(line)


def _values(record: Mapping[str, Any], forms: Mapping[str, str]) -> list[str]:
    """Numbers of a training record, where it has them."""
    return [
        f"{name.replace('_per_second', '/s')} {record[name]:{form}}"
        for name, form in forms.items()
        if isinstance(record.get(name), (int, float))
    ]
