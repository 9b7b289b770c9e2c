"""Checkpoints that several processes save and load together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from processes import run_ranks
from torch import Tensor

from runner import distributed
from runner.checkpoint import Checkpointer, latest


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


class Parts:
    """Rows over all processes, rows over two that another two repeat, and what all have alike."""

    def __init__(self, factor: float) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        full = torch.arange(70.0).view(14, 5) * factor
        line, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
        self.state: dict[str, Any] = {
            "rows": distribute_tensor(full, line, [Shard(0)]),
            "repeated": distribute_tensor(full, grid, [Replicate(), Shard(1)]),
            "same": distribute_tensor(full, line, [Replicate()]),
            "plain": full.clone(),
        }

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state

    def template(self, saved: Any) -> dict[str, Any]:
        return self.state


def beside(folder: Path) -> tuple[list[str], list[str]]:
    saver = Checkpointer(folder, {"parts": (parts := Parts(1.0))})
    told = []
    for step in (1, 2):
        assert saver.save(step, wait=False) is None
        for tensor in parts.state.values():
            (tensor.to_local() if hasattr(tensor, "to_local") else tensor).mul_(2)
        # The training talks meanwhile in its own group.
        assert sum(distributed.gather(distributed.rank())) == 6
        told += [path.name for path in saver.finish()]
    staged = sorted(index.fqn for index in saver._staging._buffers)
    Checkpointer(folder, {"parts": (back := Parts(0.0))}).load(folder / "step_00000002")
    full = torch.arange(70.0).view(14, 5) * 2
    for name, tensor in back.state.items():
        assert torch.equal(tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor, full), name
    return told, staged


def test_four_processes_save_beside_the_training_each_its_own_part(tmp_path: Path) -> None:
    found = run_ranks(beside, 4, tmp_path)
    assert [told for told, _ in found] == [["step_00000001", "step_00000002"]] * 4
    assert [[name.removeprefix("parts/") for name in staged] for _, staged in found] == [
        ["plain", "repeated", "rows", "same"],
        ["repeated", "rows"],
        ["rows"],
        ["rows"],
    ]
    alone = Holder(0.0)
    Checkpointer(tmp_path, {"parts": alone}).load(tmp_path / "step_00000001")
    assert all(torch.equal(tensor, torch.arange(70.0).view(14, 5)) for tensor in alone.state.values())
