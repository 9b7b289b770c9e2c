"""The feed of several processes: a signal that ends one's wait for data is heard by all of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from processes import run_ranks
from small import Late, mlp
from small import run as make_run

from runner import distributed
from runner.engine.ddp import DDP
from runner.engine.engine import Engine
from runner.engine.mesh import Mesh
from runner.engine.precision import PRECISIONS
from runner.folder import Bystander, RunFolder
from runner.signals import awaited, handled
from runner.train.loop import train
from runner.train.run import Run

pytestmark = pytest.mark.usefixtures("quiet")


class Cut:
    """Training data; in process 1 a signal comes while those of step `at` (from 1) are waited for."""

    def __init__(self, run: Run, at: int) -> None:
        self.order, self._data, self._at = run.train_data.order, run.train_data, at

    def steps(self, first: int, stop: int) -> Iterator[Any]:
        for step, batches in enumerate(self._data.steps(first, stop), first + 1):
            if step == self._at and distributed.rank() == 1:
                yield awaited(self._during, batches)
            else:
                yield batches

    def _during(self, batches: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return batches


def ended(kind: type[Engine], at: int) -> tuple[int, Any, list[str]]:
    """Step and signal at the end, and the checkpoints; step 3 is one that a rollback passed over."""
    folder, rank = Path(distributed.broadcast(mkdtemp())), distributed.rank()
    made = kind(DDP(torch.device("cpu"), PRECISIONS["fp32"], Mesh(rank, 2)))
    made.prepare(mlp, lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    run = make_run(folder, engine=made, micro_size=4, save=True)
    run.folder = RunFolder(folder) if rank == 0 else Bystander(folder)
    run.train_data._reader, run.train_data._readers = rank, 2
    run.train_data = Cut(run, at)
    run.progress.passed_over = {3}
    with handled() as handler:
        handler.run = run
        train(run)
    return run.progress.step, run.ending, sorted(path.name[-1] for path in (folder / "checkpoints").glob("step_*"))


def all_ended() -> list[Any]:
    return [ended(kind, at) for kind in (Engine, Late) for at in (1, 2, 3, 4)]


def test_a_signal_while_data_are_waited_for_ends_all_processes_with_a_checkpoint() -> None:
    one, other = run_ranks(all_ended, 2)
    assert one == other
    steps = [0, 1, 2, 3, *(0, 2, 3, 3)]  # one more, where the others hear of it after a step that counts on all
    assert one == [(step, signal.SIGTERM, [str(step)] if step else []) for step in steps]
