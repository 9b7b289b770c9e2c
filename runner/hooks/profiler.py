"""Profiles chosen steps with torch.profiler."""

from __future__ import annotations

import logging
from typing import Any

from runner import distributed
from runner.errors import wrong
from runner.train.hook import Hook
from runner.train.run import Run

_log = logging.getLogger("runner")


class Profiler(Hook):
    """Records the steps `first` to `last` (from 1, both included) into RUN/profile/steps_FIRST_LAST.json.

    The file is a Chrome trace (chrome://tracing, ui.perfetto.dev); the table of the costliest operators goes into a
    .txt beside it. The first profiled step also pays for starting the profiler.

    Args:
        memory: also record allocations.
        rows: operators in the table.
    """

    def __init__(self, first: int, last: int, memory: bool = False, rows: int = 20) -> None:
        if not 1 <= first <= last:
            raise wrong("hooks.profiler", "first and last must be 1 <= first <= last", value=f"{first} to {last}")
        self.first, self.last, self.memory, self.rows = first, last, memory, rows
        self._profiler: Any = None

    def on_step_start(self, run: Run) -> None:
        if run.progress.step + 1 != self.first:
            return
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if run.engine.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities, profile_memory=self.memory)
        self._profiler.__enter__()

    def on_step_end(self, run: Run) -> None:
        if self._profiler is not None and run.progress.step == self.last:
            self._finish(run)

    def on_run_end(self, run: Run) -> None:
        if self._profiler is not None:
            self._finish(run)

    def on_exception(self, run: Run, error: BaseException) -> None:
        if self._profiler is not None:
            self._finish(run)

    def _finish(self, run: Run) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        profiler.__exit__(None, None, None)
        folder = run.folder.path / "profile"
        folder.mkdir(exist_ok=True)
        rank = "" if distributed.world_size() == 1 else f"_rank_{distributed.rank()}"
        trace = folder / f"steps_{self.first}_{self.last}{rank}.json"
        profiler.export_chrome_trace(str(trace))
        by = "self_cuda_time_total" if run.engine.device.type == "cuda" else "self_cpu_time_total"
        trace.with_suffix(".txt").write_text(profiler.key_averages().table(sort_by=by, row_limit=self.rows))
        _log.info("profile of steps %d to %d: %s", self.first, self.last, trace)
