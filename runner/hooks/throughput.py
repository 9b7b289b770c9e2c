"""Records samples and tokens a second."""

from __future__ import annotations

import time

import torch

from runner import distributed
from runner.train.hook import Hook
from runner.train.run import Run


class Throughput(Hook):
    """`samples_per_second` (and `tokens_per_second` where the task counts tokens) since the last record.

    The time of evaluations and checkpoints is left out.
    """

    def on_run_start(self, run: Run) -> None:
        self._run = run
        self._last = self._now()
        self._tokens_per_second: float | None = None
        run.gauges["samples_per_second"] = self._measure
        run.gauges["tokens_per_second"] = lambda: self._tokens_per_second

    def _now(self) -> tuple[float, int, int]:
        run = self._run
        tokens = 0
        if run.counts_tokens:
            tokens = int(distributed.total(torch.tensor(float(run.tokens), dtype=torch.float64)).item())
        return time.perf_counter() - run.paused_seconds, run.progress.samples, tokens

    def _measure(self) -> float | None:
        (before, samples_before, tokens_before), self._last = self._last, self._now()
        now, samples, tokens = self._last
        if samples <= samples_before:  # a rollback
            self._tokens_per_second = None
            return None
        seconds = max(now - before, 1e-9)
        self._tokens_per_second = (tokens - tokens_before) / seconds if self._run.counts_tokens else None
        return (samples - samples_before) / seconds
