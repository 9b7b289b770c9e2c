"""G20: a save beside the training is published when it is durable, fails aloud, waits for its turn and for the exit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from guarantees.cases_g03 import Box
from guarantees.cases_g20 import Case, cases, run
from guarantees.supervised import WORDS, Program
from runner.checkpoint import Checkpointer, SaveFailed, storage
from runner.errors import RunnerError


@pytest.mark.parametrize("case", cases(10, seed=0), ids=str)
def test_beside_the_training(case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path) is None


def test_buffers_are_used_again_and_only_they_are_written(tmp_path: Path) -> None:
    box = Box(1)
    saver = Checkpointer(tmp_path, {"box": box})
    addresses = []
    for step in (1, 2):
        box.fill(step)
        assert saver.save(step, wait=False) is None
        saver.finish()
        addresses.append([buffer.data_ptr() for buffer in saver._staging._buffers.values()])
    assert addresses[0] == addresses[1]
    assert not set(addresses[0]) & {tensor.data_ptr() for name, tensor in box.state.items() if name != "number"}
    box.state["t1"] = torch.zeros(5, dtype=torch.bfloat16)
    saver.save(3, wait=False)
    saver.finish()
    back = Box(0)
    Checkpointer(tmp_path, {"box": back}).load(tmp_path / "step_00000003")
    assert torch.equal(back.state["t1"], box.state["t1"])


def test_a_save_that_waits_takes_no_buffer(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path, {"box": Box(1)})
    saver.save(1)
    assert saver._staging._buffers == {}


def test_poll_tells_only_when_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, written = threading.Event(), storage._write_file
    monkeypatch.setattr(storage, "_write_file", lambda *arguments: go_on.wait(20) and written(*arguments))
    saver = Checkpointer(tmp_path, {"box": Box(1)}, best=("loss", "min"))
    assert saver.poll() == []
    saver.save(1, wait=False, metrics={"loss": 1.0})
    assert saver.poll() == []
    assert saver.saving
    assert saver.best is None
    # What is on its way counts: it need not be saved twice.
    assert not saver.improves({"loss": 1.5})
    assert saver.improves({"loss": 0.5})
    assert not (tmp_path / "step_00000001").exists()
    go_on.set()
    assert saver.finish() == [tmp_path / "step_00000001"]
    assert saver.best is not None
    assert saver.best["step"] == 1


def test_what_failed_does_not_count_as_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise ValueError("out of order")

    saver = Checkpointer(tmp_path, {"box": Box(1)}, best=("loss", "min"))
    saver.save(1, metrics={"loss": 1.0})
    monkeypatch.setattr(storage, "_write_file", fail)
    saver.save(2, wait=False, metrics={"loss": 0.5})
    assert not saver.improves({"loss": 0.7})
    with pytest.raises(SaveFailed, match="step_00000002 could not be saved: ValueError: out of order"):
        saver.finish()
    assert saver.improves({"loss": 0.7})
    assert saver.best is not None
    assert saver.best["step"] == 1


def test_the_next_save_says_that_the_one_before_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_write_file", lambda *_: 1 / 0)
        saver = Checkpointer(tmp_path, {"box": Box(1)})
        saver.save(1, wait=False)
        with pytest.raises(SaveFailed, match="step_00000001"):
            saver.save(2, wait=False)
    assert saver.save(3) == tmp_path / "step_00000003"
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_close_says_it_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage, "_write_file", lambda *_: 1 / 0)
    saver = Checkpointer(tmp_path, {"box": Box(1)})
    saver.save(1, wait=False)
    saver.close()
    assert "step_00000001 could not be saved: ZeroDivisionError" in caplog.text
    saver.close()


def test_what_cannot_be_saved_is_said_at_once(tmp_path: Path) -> None:
    box = Box(1)
    box.state["odd"] = object()
    with pytest.raises(RunnerError, match="cannot save `box/odd`"):
        Checkpointer(tmp_path, {"box": box}).save(1, wait=False)


_EXIT = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from guarantees.cases_g03 import Box
from guarantees.cases_g20 import slowly
from runner.checkpoint import Checkpointer
saver = Checkpointer(Path(sys.argv[1]), {"box": Box(7)})
import runner.checkpoint.storage
slowly(0.5)
saver.save(7, {"step": 7}, wait=False)
if sys.argv[3] == "raise":
    raise SystemExit(3)
"""


@pytest.mark.parametrize("how", ["return", "raise"])
def test_a_program_that_ends_waits_for_its_save(tmp_path: Path, how: str) -> None:
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", _EXIT, str(tmp_path), str(tests), how],
        timeout=100,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == (3 if how == "raise" else 0), done.stderr
    box = Box(0)
    assert Checkpointer(tmp_path, {"box": box}).load(tmp_path / "step_00000007") == {"step": 7}
    assert box.holds(7)


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_of_two_processes_fails_the_save_in_flight_is_not_lost(tmp_path: Path, rank: int) -> None:
    fails = f"hooks.bad={{_target_: trouble.Trouble, what: error, rank: {rank}, step: 5}}"
    words = (
        "launch.nproc_per_node=2",
        "train.steps=20",
        "checkpoint.every.steps=4",
        "hooks.late._target_=trouble.LateSave",
    )
    seen = Program(tmp_path, (*WORDS, *words, fails)).end()
    assert seen.code == 1
    assert "ValueError: boom" in seen.last
    assert [path.name for path in (seen.run / "checkpoints").iterdir()] == ["step_00000004"], seen.err


def test_what_takes_long_is_not_waited_for_when_a_process_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    go_on, written = threading.Event(), storage._write_file
    monkeypatch.setattr(storage, "_write_file", lambda *arguments: go_on.wait(20) and written(*arguments))
    saver = Checkpointer(tmp_path, {"box": Box(1)})
    saver.save(1, wait=False)
    saver.close(0.1)
    assert "step_00000001 was being saved, and is lost" in caplog.text
    go_on.set()
    assert saver.finish() == [tmp_path / "step_00000001"]
