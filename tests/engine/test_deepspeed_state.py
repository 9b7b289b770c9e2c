"""States of DeepSpeed's stages: in parts, by parameter name, in the format of the other backends."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from engine import deepspeed_ranks as ranks
from processes import run_ranks

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.fixture(scope="module")
def runs() -> tuple[Any, list[dict[str, Any]]]:
    """A state saved by the single backend, and what two processes made of it."""
    with torch.random.fork_rng(devices=[]):
        _, state = ranks.single(3)
    return state, run_ranks(ranks.exchanged, 2, state, timeout=90)


def test_states_look_as_those_of_one_process(runs: tuple[Any, list[dict[str, Any]]]) -> None:
    expected, (first, second) = runs
    for stage in range(4):
        assert ranks.equal(first["states"][stage], second["states"][stage])
        found = first["states"][stage]
        flat, other = ranks.flattened(found), ranks.flattened(expected)
        assert flat.keys() == other.keys()
        for key, value in other.items():
            if isinstance(value, torch.Tensor):
                assert flat[key].dtype == value.dtype, key
                torch.testing.assert_close(flat[key], value, rtol=1e-5, atol=1e-7)
        assert found["optimizer"]["groups"] == expected["optimizer"]["groups"]
        assert found["optimizer"]["configured"] == expected["optimizer"]["configured"]
        assert found["optimizer"]["type"] == "AdamW"
        assert found["optimizer"]["state"]["0.weight"]["step"] == 3


@pytest.mark.parametrize("stage", range(4))
def test_goes_on_from_every_state(runs: tuple[Any, list[dict[str, Any]]], stage: int) -> None:
    expected = ranks.by_hand(6)[3:]
    for found in runs[1]:
        for source in ("single", 0, 1, 2, 3):
            assert found["equal"][source, stage]
            curve = found["curves"][source, stage, "loaded"]
            for one, other in zip(curve, expected, strict=True):
                assert one == pytest.approx(other, rel=1e-5)
        assert found["curves"][stage, stage, "loaded"] == found["curves"][stage, stage]


def test_single_goes_on_from_every_stage(runs: tuple[Any, list[dict[str, Any]]]) -> None:
    expected = ranks.by_hand(6)[3:]
    for state in runs[1][0]["states"].values():
        curve, _ = ranks.single(3, state, first=3)
        for one, other in zip(curve, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-5)


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    return run_ranks(ranks.small_memory, 4, timeout=120)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_process_ever_holds_the_model(four: list[dict[str, Any]], stage: int) -> None:
    """Held: the model / processes. At most for a moment: that and a few times the largest parameter."""
    for found in (rank["memory"][stage] for rank in four):
        share = found["model"] / found["processes"]
        assert found["model"] > 10 * found["largest"]
        for name, copies in (("model", 1), ("optimizer", 2)):
            assert found[f"{name} held"] <= 1.03 * copies * share
            assert found[f"{name} target"] <= 1.03 * copies * share
            assert found[f"{name} saving"] <= 1.03 * copies * share + 3 * found["largest"]
            assert found[f"{name} loading"] <= 1.03 * copies * share + 3 * found["largest"]
            assert found[f"{name} saving"] > found["largest"]  # it was looked at
            assert found[f"{name} shared"] == 0
            assert found[f"{name} same"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_bit_is_kept_and_nothing_stale(four: list[dict[str, Any]], stage: int) -> None:
    for found in (rank["exact"][stage] for rank in four):
        assert found == {"bits": True, "pairs": found["pairs"], "stale": 0.0, "left": []}
        assert found["pairs"] > 15
