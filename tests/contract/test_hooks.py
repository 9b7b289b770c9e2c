"""Hooks that hold weights, on every backend."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks

from contract.training import settings, trained

pytestmark = pytest.mark.usefixtures("quiet")

STORED = {"milestones": None, "async": False, "on_error": "stop"}
HOOKS = {
    "gradient_norm": {"_target_": "runner.hooks.gradient_norm.GradientNorm"},
    "curves": {"_target_": "contract.training.Curves"},
    "ema": {"_target_": "runner.hooks.ema.EMA", "decay": 0.8},
}


def averaged(backend: str) -> dict[str, Any]:
    return trained(backend, 1, {"hooks": HOOKS})


def each_averaged(backends: list[str]) -> list[dict[str, Any]]:
    return [averaged(backend) for backend in backends]


def resumed(first: str, second: str) -> dict[str, Any]:
    """Trains 10 steps on one backend, goes on for 10 on another; the evaluation is that of the averages."""
    from runner import distributed
    from runner.assemble import assemble, check
    from runner.distributed import Ranks
    from runner.folder import Bystander, RunFolder
    from runner.train.loop import train

    rank, world = distributed.rank(), distributed.world_size()
    ranks = Ranks(rank, world, rank, world)
    with tempfile.TemporaryDirectory() as own:
        path = Path(distributed.broadcast(own))
        folder = RunFolder(path) if rank == 0 else Bystander(path)
        saving = {"every": {"steps": 10, "epochs": None, "seconds": None}, "keep": 4, "best": None, **STORED}
        for backend in (first, second):
            plain = settings(backend, world, 1, hooks=HOOKS, checkpoint=saving)
            resume = None if backend == first else path / "checkpoints" / "step_00000010"
            run = assemble(plain, check(plain, ranks), folder, resume=resume)
            train(run)
        distributed.barrier()
        return {"losses": run.hooks["curves"].losses, "metrics": run.metrics, "first": run.first_step}


def test_the_average_of_the_weights_is_the_same_on_every_backend() -> None:
    alone = averaged("single")
    plain = trained("single")
    assert alone["losses"] == plain["losses"]
    assert alone["metrics"]["loss"] != plain["metrics"]["loss"]
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    for found in run_ranks(each_averaged, 2, ["ddp", "fsdp", "deepspeed-z2"], timeout=150)[0]:
        assert found["metrics"]["loss"] == pytest.approx(alone["metrics"]["loss"], rel=1e-5)
        assert found["losses"] == pytest.approx(plain["losses"], rel=1e-5)


def test_a_run_with_averages_goes_on_with_another_backend() -> None:
    alone = averaged("single")
    for found in run_ranks(resumed, 2, "fsdp", "ddp", timeout=150):
        assert found["first"] == 10
        assert found["losses"] == pytest.approx(alone["losses"][10:], rel=1e-5)
        assert found["metrics"]["loss"] == pytest.approx(alone["metrics"]["loss"], rel=1e-5)


def test_going_on_from_ddp_with_fsdp() -> None:
    alone = averaged("single")
    found = run_ranks(resumed, 2, "ddp", "fsdp", timeout=150)[0]
    assert found["losses"] == pytest.approx(alone["losses"][10:], rel=1e-5)
    assert found["metrics"]["loss"] == pytest.approx(alone["metrics"]["loss"], rel=1e-5)


class Normed(torch.nn.Sequential):
    """A model whose buffers move in training."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 3))


def going_on(backend: str) -> dict[str, Any]:
    """A training in one part, and the same in two: losses, and the buffers that were saved at the end of each."""
    from safetensors import safe_open

    from runner import distributed
    from runner.assemble import assemble, check
    from runner.distributed import Ranks
    from runner.folder import Bystander, RunFolder
    from runner.train.loop import train

    rank, world = distributed.rank(), distributed.world_size()
    ranks = Ranks(rank, world, rank, world)
    found: dict[str, Any] = {"losses": [], "means": []}
    with tempfile.TemporaryDirectory() as own:
        path = Path(distributed.broadcast(own))
        folder = RunFolder(path) if rank == 0 else Bystander(path)
        saving = {"every": {"steps": 5, "epochs": None, "seconds": None}, "keep": 9, "best": None, **STORED}
        for resume in (None, path / "checkpoints" / "step_00000005"):
            model = {"_target_": "contract.test_hooks.Normed"}
            plain = settings(backend, world, 1, steps=10, model=model, checkpoint=saving)
            run = assemble(plain, check(plain, ranks), folder, resume=resume)
            train(run)
            found["losses"].append(run.hooks["curves"].losses[-5:])
            distributed.barrier()
            with safe_open(path / "checkpoints" / "step_00000010" / "rank_0.safetensors", "pt") as tensors:
                found["means"].append(tensors.get_tensor("model/1.running_mean").tolist())
            distributed.barrier()
    return found


def each_going_on(backends: list[str]) -> list[dict[str, Any]]:
    return [going_on(backend) for backend in backends]


def test_moving_buffers_are_those_of_the_first_process() -> None:
    """On the same processes a run in two parts is the run in one, bit for bit, buffers included."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    for found in run_ranks(each_going_on, 2, ["ddp", "fsdp", "deepspeed-z1"], timeout=150)[1]:
        whole, parts = found["losses"]
        assert whole == parts
        whole, parts = found["means"]
        assert whole == parts
