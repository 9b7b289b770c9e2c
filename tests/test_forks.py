"""Processes that a user's own code forks from a training hear signals as any other does, and tell nobody of theirs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from programs import begin, end

MINE = """\
import multiprocessing, os, signal, subprocess, time
import torch
from runner import distributed
from runner.train.hook import Hook

def wait():
    time.sleep(60)

def helper():
    process = multiprocessing.get_context("fork").Process(target=wait)
    process.start()
    time.sleep(0.2)
    began = time.monotonic()
    process.terminate()
    process.join(10)
    assert process.exitcode == -signal.SIGTERM, process.exitcode

class Points(torch.utils.data.Dataset):
    def __init__(self, make):
        self.points = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
        if make == "pool":
            with multiprocessing.get_context("fork").Pool(2) as pool:
                assert pool.map(abs, range(8)) == list(range(8))
        if make == "helper":
            helper()
        self.decodes = make == "program"

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        if self.decodes and index % 100 == 0:
            program = subprocess.Popen(["sleep", "60"])
            program.terminate()
            assert program.wait(10) == -signal.SIGTERM
        return self.points[index], index % 4

class Helps(Hook):
    def on_step_end(self, run):
        if run.progress.step == 3 and distributed.rank() == 0:
            helper()
"""


@pytest.mark.parametrize("make", ["pool", "helper"])
@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_data_set_forks_can_be_ended(tmp_path: Path, make: str, processes: int) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    words = ["+recipe=smoke", "run_dir=r", "train.steps=2", f"data.train={{_target_: mine.Points, make: {make}}}"]
    if processes > 1:
        words += ["backend=ddp", f"launch.nproc_per_node={processes}"]
    told = end(begin(tmp_path, *words), tmp_path / "r")
    assert told.code == 0, told.err
    assert told.json("summary.json")["steps"] == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_what_a_hook_forks_ends_no_run(tmp_path: Path, processes: int) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    words = ["+recipe=smoke", "run_dir=r", "train.steps=6", "hooks.helps={_target_: mine.Helps}"]
    if processes > 1:
        words += ["backend=ddp", f"launch.nproc_per_node={processes}"]
    told = end(begin(tmp_path, *words), tmp_path / "r")
    assert told.code == 0, told.err
    assert told.json("summary.json")["steps"] == 6


def test_programs_that_data_workers_start_can_be_ended(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    data = "data.train={_target_: mine.Points, make: program}"
    told = end(
        begin(tmp_path, "+recipe=smoke", "run_dir=r", "train.steps=6", "data.num_workers=2", data), tmp_path / "r"
    )
    assert told.code == 0, told.err


def test_data_workers_where_memory_without_a_name_is_not_allowed(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\ndef refused(*arguments):\n    raise PermissionError(1, 'not allowed')\nos.memfd_create = refused\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parent.parent)])
    words = ["+recipe=smoke", "run_dir=r", "train.steps=2", "data.num_workers=1"]
    told = end(begin(tmp_path, *words, PYTHONPATH=path), tmp_path / "r")
    assert told.code == 0, told.err


def test_ctrl_c_is_left_to_the_training(tmp_path: Path) -> None:
    """It comes to all processes of a terminal: a Pool that is needed for the step's end must live on."""
    (tmp_path / "mine.py").write_text(
        MINE
        + """
class Pooled(Hook):
    def on_run_start(self, run):
        self.pool = multiprocessing.get_context("fork").Pool(1)

    def on_step_end(self, run):
        if run.progress.step == 2:
            os.kill(0, signal.SIGINT)  # all of the group
            time.sleep(0.2)
        assert self.pool.map(abs, [-1]) == [1]

    def on_run_end(self, run):
        self.pool.terminate()
"""
    )
    words = ["+recipe=smoke", "run_dir=r", "hooks.pooled={_target_: mine.Pooled}"]
    told = end(begin(tmp_path, *words), tmp_path / "r")
    assert told.code == 130, told.err
    assert told.json("summary.json")["steps"] == 2
    assert signal.Signals.SIGINT.name in told.err
