"""DeepSpeed with models of other kinds, bf16, offloading, own loops, and numbers of processes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from engine import deepspeed_ranks as ranks
from processes import run_ranks

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    return run_ranks(ranks.various, 2, timeout=120)


@pytest.mark.parametrize("stage", range(4))
def test_tied_frozen_and_unused_weights_and_buffers(runs: list[dict[str, Any]], stage: int) -> None:
    norms, weights = ranks.tied_by_hand()
    for found in (run["tied"][stage] for run in runs):
        assert found["norms"] == pytest.approx(norms, rel=1e-5)
        assert found["same"]
        assert found["state"]["model"].keys() == weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(found["state"]["model"][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", range(4))
def test_a_broken_window_leaves_nothing(runs: list[dict[str, Any]], stage: int) -> None:
    expected = ranks.by_hand(3)
    for found in (run["broken"][stage] for run in runs):
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16(runs: list[dict[str, Any]], stage: int) -> None:
    expected = ranks.by_hand(8)
    for found in (run["half"][stage] for run in runs):
        for one, other in zip(found["curve"], expected, strict=True):
            assert one == pytest.approx(other, rel=3e-2)
        assert {value.dtype for value in found["state"]["model"].values()} == {torch.float32}
        assert found["state"]["optimizer"]["dtypes"]["0.weight"] == "float32"
        assert found["loaded"]
        assert found["nan"]["unchanged"]
        assert found["nan"]["after"] == found["nan"]["expected"]


def test_compiled_blocks_with_checkpointing_train_and_are_evaluated() -> None:
    for found in run_ranks(ranks.compiled, 2, "full", timeout=120):
        for one, other in zip(found["changed"], found["as it is"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world", [1, 3])
def test_other_numbers_of_processes(world: int) -> None:
    expected = ranks.by_hand(4)
    for found in run_ranks(ranks.parity, world, [2, 3], 4):
        for values in found.values():
            for one, other in zip(values, expected, strict=True):
                assert one == pytest.approx(other, rel=1e-5)


def test_offloading() -> None:
    expected = ranks.by_hand(6)
    for found in run_ranks(ranks.offloaded, 2, timeout=120):
        for key, values in found.items():
            for one, other in zip(values, expected, strict=True):
                assert one == pytest.approx(other, rel=1e-5), key


def test_own_loops() -> None:
    for found in run_ranks(ranks.own_loop, 2):
        assert found["norms"][0] == pytest.approx(ranks.by_hand(1)[0][1], rel=1e-5)
        assert len(found["refused"]) == 4
        assert "one was prepared before" in found["refused"][0]
        assert "2 optimizers" in found["refused"][2]
        assert "flat pieces" in found["refused"][3]
        assert any("ZeRO stage 2" in line for line in found["lines"])
        assert any("the last micro-batch" in line for line in found["lines"])


def test_runs_one_after_the_other_in_one_interpreter() -> None:
    expected = ranks.by_hand(2)
    (found,) = run_ranks(ranks.one_after_the_other, 1)
    for curve, left, clean in found:
        for one, other in zip(curve, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-5)
        assert left == [False, False]
        assert clean
