"""DeepSpeed at every stage against a hand-written loop in one process."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
from engine import deepspeed_ranks as ranks
from processes import run_ranks

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

STAGES = [0, 1, 2, 3]


def worst(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> float:
    """The largest relative difference of a loss or norm."""
    pairs = [pair for one, other in zip(found, expected, strict=True) for pair in zip(one, other, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


@pytest.mark.parametrize("stages", [[0, 1], [2, 3]])
def test_same_losses_and_norms_as_one_process(stages: list[int]) -> None:
    expected = ranks.by_hand(20)
    for found in run_ranks(ranks.parity, 2, stages, 20):
        assert len(found) == 3 * len(stages)
        for key, values in found.items():
            assert worst(values, expected) <= 1e-5, key


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    """What two processes found at all stages."""
    return run_ranks(ranks.small_runs, 2, STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_token_weights_and_a_process_without_samples(runs: list[dict[str, Any]], stage: int) -> None:
    expected = ranks.uneven_by_hand()
    for found in runs:
        assert worst(found["uneven"][stage], expected) <= 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_on_one_process_skips_the_step_on_all(runs: list[dict[str, Any]], stage: int) -> None:
    for found in runs:
        assert found["nan"][stage]["unchanged"]
        assert found["nan"][stage]["after"] == found["nan"][stage]["expected"]


@pytest.mark.parametrize("stage", STAGES)
def test_rates_of_the_groups_reach_the_step(runs: list[dict[str, Any]], stage: int) -> None:
    assert [found["rates"][stage] for found in runs] == [True, True]


@pytest.mark.parametrize("stage", STAGES)
def test_the_words_of_a_handle(runs: list[dict[str, Any]], stage: int) -> None:
    for found in (run["words"][stage] for run in runs):
        norm = pytest.approx(found["expected"], rel=1e-5)
        assert found["norms"][:4] == [norm] * 4
        assert found["norms"][4] == pytest.approx(0.01, rel=1e-3)
        assert found["again"] == norm
        assert found["valued"] == pytest.approx(found["expected_valued"], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_travel_with_the_last_micro_batch_only(runs: list[dict[str, Any]], stage: int) -> None:
    for found in (run["communication"][stage] for run in runs):
        # Stage 3 gathers weights for each forward and backward pass.
        gradients = [[name for name in names if "gather" not in name] for names in found]
        assert gradients[:3] == [[], [], []]
        assert gradients[3]
        assert bool(found[0]) is (stage == 3)
