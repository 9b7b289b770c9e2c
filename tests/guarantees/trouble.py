"""What can go wrong in a process of a run, at a step, as hooks, data, a model and a task of the user's own."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runner import distributed
from runner.data.synthetic import separable_classification
from runner.tasks.classification import Classification
from runner.train.hook import Hook
from runner.train.run import Run


def make(what: str) -> None:
    """Trouble of one kind, here and now; a file says when."""
    Path("began").touch()
    if what == "error":
        raise ValueError("boom")
    if what == "system_exit":
        raise SystemExit("enough")
    if what == "exit_7":
        os._exit(7)
    if what == "exit_0":
        os._exit(0)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "sleep":
        time.sleep(600)
    if what == "gil":
        re.match(r"(a+)+$", "a" * 60 + "b")  # one call of C that never lets go
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.001)
    if what == "collective":
        torch.distributed.all_gather_object([None] * distributed.world_size(), 1)
    if what == "collective_alone":
        torch.distributed.barrier()


class Trouble(Hook):
    """After a step, in one process; `times` says how often, over all attempts (a file counts)."""

    def __init__(self, what: str, rank: int = 1, step: int = 3, times: int = 1_000, count: str = "count") -> None:
        self.what, self.rank, self.step, self.times, self.count = what, rank, step, times, Path(count)

    def on_step_end(self, run: Run) -> None:
        if run.progress.step == self.step and distributed.rank() == self.rank:
            before = len(self.count.read_text()) if self.count.exists() else 0
            if before < self.times:
                self.count.write_text("x" * (before + 1))
                make(self.what)


class Slow(Hook):
    """Steps that take a while: all of them, or one in one process."""

    def __init__(self, seconds: float = 0.1, rank: int | None = None, step: int | None = None) -> None:
        self.seconds, self.rank, self.step = seconds, rank, step

    def on_step_end(self, run: Run) -> None:
        if self.step in (None, run.progress.step) and self.rank in (None, distributed.rank()):
            time.sleep(self.seconds)


def moment() -> str:
    """What goes slowly for now: a word in a file, so that the same command goes quickly once that is removed."""
    try:
        return Path("moment").read_text()
    except FileNotFoundError:
        return ""


class Moments(Hook):
    """Steps and saves that take a while as long as there is a `moment`, and some that hardly end (`asleep`)."""

    def on_run_start(self, run: Run) -> None:
        from runner.checkpoint import storage

        write = storage._write_file

        def late(*arguments: Any) -> Any:
            if moment() == "save":
                time.sleep(0.3)
            if moment() == "second_save":
                asleep()
            return write(*arguments)

        storage._write_file = late

    def on_step_end(self, run: Run) -> None:
        if moment():
            time.sleep(0.1)
        if moment() == "second" and run.progress.step == 6 and distributed.rank() == 0:
            asleep()


def asleep() -> None:
    Path("began").touch()
    time.sleep(30)


class LateSave(Hook):
    """Checkpoints take a while to write, or one process has trouble at it."""

    def __init__(self, seconds: float = 1.0, what: str = "", rank: int = 1) -> None:
        self.seconds, self.what, self.rank = seconds, what, rank

    def on_run_start(self, run: Run) -> None:
        from runner.checkpoint import storage

        write = storage._write_file

        def late(*arguments: Any) -> Any:
            time.sleep(self.seconds)
            if distributed.rank() == self.rank:
                make(self.what)
            return write(*arguments)

        storage._write_file = late


class SlowSave(Hook):
    """Fails, or takes long, while the checkpoint is being written."""

    def __init__(self, what: str, rank: int = 0) -> None:
        self.what, self.rank = what, rank

    def state_dict(self) -> dict[str, Any]:
        if distributed.rank() == self.rank:
            make(self.what)
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Data(torch.utils.data.Dataset[Any]):
    """A sample that never comes, comes late, or raises: in a data worker, or outside of the checks of a start."""

    def __init__(self, what: str, at: int = 100, count: int = 256, seconds: float = 0.0) -> None:
        self.of, self.what, self.at = separable_classification(count, 16, 4, seed=0), what, at
        self.seconds = seconds

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, index: int) -> Any:
        worker = torch.utils.data.get_worker_info() is not None
        if index == self.at and self.what == "late":
            time.sleep(self.seconds)
        elif index == self.at and self.what == "moment":
            time.sleep(600 if worker and moment() else 0)
        elif index == self.at and (worker or self.what == "error"):
            make(self.what)
        return self.of[index]


class Model(nn.Linear):
    """Has trouble in its n-th forward pass in one process."""

    def __init__(self, what: str = "error", rank: int = 1, call: int = 3) -> None:
        super().__init__(16, 4)
        self.what, self.rank, self.call, self.calls = what, rank, call, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.call and distributed.rank() == self.rank:
            make(self.what)
        return super().forward(x)


class Task(Classification):
    def __init__(self, num_classes: int, rank: int = 1) -> None:
        super().__init__(num_classes)
        self.rank, self.calls = rank, 0

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        self.calls += 1
        if self.calls == 3 and distributed.rank() == self.rank:
            make("error")
        return super().loss(outputs, batch)


class SlowTask(Classification):
    """Evaluations that take a while: the first batches in one process, or all as long as the `moment` says so."""

    def __init__(self, num_classes: int, seconds: float = 0.0, calls: int = 0, rank: int = 0) -> None:
        super().__init__(num_classes)
        self.seconds, self.calls, self.rank = seconds, calls, rank

    def metrics(self, outputs: Any, batch: Any) -> Any:
        self.calls -= 1
        if self.calls >= 0 and distributed.rank() == self.rank:
            time.sleep(self.seconds)
        if moment() == "evaluation":
            time.sleep(0.1)
        return super().metrics(outputs, batch)
