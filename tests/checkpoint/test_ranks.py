"""Checkpoints that several processes save and load together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks
from torch import Tensor

from runner import distributed
from runner.checkpoint import Checkpointer, latest
from runner.errors import RunnerError


class Holder:
    """A tensor that all processes have alike, and a number."""

    def __init__(self, value: float) -> None:
        self.state = {"w": torch.full((3, 2), value), "n": value}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Failing(Holder):
    """Cannot be saved on one rank."""

    def state_dict(self) -> dict[str, Any]:
        if distributed.rank() == 1:
            self.state["w"] = torch.zeros(2, dtype=torch.complex128)
        return self.state


def saved(folder: Path) -> dict[str, Any]:
    checkpointer = Checkpointer(folder, {"holder": Holder(1.5)}, keep=2)
    for step in (1, 2, 3):
        checkpointer.save(step, {"said": distributed.rank()})
    newest = checkpointer.latest()
    assert newest is not None
    other = Checkpointer(folder, {"holder": (back := Holder(0.0))})
    extra = other.load(newest)
    w: Tensor = back.state["w"]
    names = sorted(p.name for p in folder.iterdir())
    distributed.barrier()
    return {"names": names, "extra": extra, "w": w.tolist(), "n": back.state["n"]}


def failed(folder: Path) -> str:
    checkpointer = Checkpointer(folder, {"holder": Failing(1.0)})
    try:
        checkpointer.save(4)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def both(folder: Path) -> tuple[Any, Any]:
    return saved(folder), failed(folder)


def test_two_processes_save_prune_and_load_as_one(tmp_path: Path) -> None:
    found = run_ranks(both, 2, tmp_path)
    for state, _ in found:
        assert state == {
            "names": ["step_00000002", "step_00000003"],
            "extra": {"said": 0},
            "w": [[1.5] * 2] * 3,
            "n": 1.5,
        }
    # What one process cannot write, none has written; the folder is as it was.
    assert [error for _, error in found] == [
        "RunnerError: rank 1: RunnerError: cannot save `holder/w`: a tensor of type complex128",
        "RunnerError: cannot save `holder/w`: a tensor of type complex128",
    ]
    newest = latest(tmp_path)
    assert newest is not None
    assert newest.name == "step_00000003"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


def test_one_process_loads_what_two_have_saved(tmp_path: Path) -> None:
    run_ranks(saved, 2, tmp_path)
    back = Holder(0.0)
    Checkpointer(tmp_path, {"holder": back}).load(tmp_path / "step_00000003")
    assert back.state["n"] == 1.5
    assert torch.equal(back.state["w"], torch.full((3, 2), 1.5))


def test_a_rank_that_hears_of_a_failure_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    answers = iter([None, False])
    monkeypatch.setattr(distributed, "broadcast", lambda value, source=0: next(answers))
    with pytest.raises(RunnerError, match="first process could not save"):
        Checkpointer(tmp_path, {"holder": Holder(1.0)}).save(1)
