"""Every backend, precision and accumulation gives the training that a plain loop in one process gives."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import pytest
import torch
from processes import run_ranks

from contract.training import by_hand, each_trained, trained

pytestmark = pytest.mark.usefixtures("quiet")

HAVE_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAVE_DEEPSPEED, reason="deepspeed is not installed")

ACCUMULATIONS = (1, 2, 4)


@cache
def hand() -> dict[str, Any]:
    return by_hand()


@cache
def alone(precision: str) -> dict[str, Any]:
    return trained("single", 1, {"precision": precision})


def worst(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected)
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float, what: object) -> None:
    assert worst(found["losses"], expected["losses"]) <= tolerance, what
    assert worst(found["norms"], expected["norms"]) <= tolerance, what


def assert_alike(ranks: list[Any]) -> None:
    """All processes report the same."""
    for other in ranks[1:]:
        assert other == ranks[0]


def test_single_with_any_accumulation_is_the_plain_loop() -> None:
    for accumulation in ACCUMULATIONS:
        found = trained("single", accumulation)
        assert_same(found, hand(), 1e-5, accumulation)
        assert found["metrics"]["samples"] == 21
        assert found["metrics"]["accuracy"] == hand()["accuracy"]
        assert found["metrics"]["loss"] == pytest.approx(hand()["loss"], rel=1e-5)
        assert found["samples"] == 4 * 100


@pytest.mark.parametrize("backend", ["ddp", "fsdp"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_processes_is_the_plain_loop(backend: str, world: int) -> None:
    """20 steps of 24 samples, of 100 samples: the last step of each epoch has 4, for 3 processes of 8 each."""
    cases: list[tuple[str, int, dict[str, Any]]] = [(backend, k, {}) for k in ACCUMULATIONS if 24 % (world * k) == 0]
    if backend == "fsdp" and world == 4:
        cases += [("fsdp", k, {"replicas": 2}) for k in (1, 2)]
    ranks = run_ranks(each_trained, world, cases, timeout=150)
    assert_alike(ranks)
    for case, found in zip(cases, ranks[0], strict=True):
        assert_same(found, hand(), 1e-5, case)
        assert found["metrics"]["samples"] == 21
        assert found["metrics"]["accuracy"] == hand()["accuracy"]
        assert found["metrics"]["loss"] == pytest.approx(hand()["loss"], rel=1e-5)


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_is_the_plain_loop(stage: int) -> None:
    cases: list[tuple[str, int, dict[str, Any]]] = [(f"deepspeed-z{stage}", k, {}) for k in ACCUMULATIONS]
    ranks = run_ranks(each_trained, 2, cases, timeout=200)
    assert_alike(ranks)
    for case, found in zip(cases, ranks[0], strict=True):
        assert_same(found, hand(), 1e-5, case)
        assert found["metrics"]["accuracy"] == hand()["accuracy"]


@pytest.mark.parametrize("backend", ["ddp", "fsdp"])
def test_half_precisions_are_those_of_one_process(backend: str) -> None:
    precisions = ("bf16", "fp16", "bf16_full")
    ranks = run_ranks(each_trained, 2, [(backend, 1, {"precision": name}) for name in precisions], timeout=150)
    assert_alike(ranks)
    for name, found in zip(precisions, ranks[0], strict=True):
        # Weights in bfloat16 round every step; the others round only what flows through the layers.
        tolerance = 5e-2 if name == "bf16_full" else 5e-3
        assert worst(found["losses"], alone(name)["losses"]) <= tolerance, name
        assert found["skipped"] == alone(name)["skipped"]


def refused(backend: str, changes: dict[str, Any]) -> list[tuple[str | None, str]]:
    """What a configuration is refused with, before a model exists."""
    from contract.training import settings
    from runner import distributed
    from runner.assemble import check
    from runner.distributed import Ranks
    from runner.errors import InputError

    rank, world = distributed.rank(), distributed.world_size()
    try:
        check(settings(backend, world, 1, **changes), Ranks(rank, world, rank, world))
    except InputError as error:
        return [(problem.key, problem.why) for problem in error.problems]
    return []


@needs_deepspeed
def test_deepspeed_refuses_fp16_on_a_cpu_before_the_library_does() -> None:
    for found in run_ranks(refused, 2, "deepspeed-z2", {"precision": "fp16"}):
        assert len(found) == 1
        assert found[0][0] == "precision"
        assert "fp16" in found[0][1] or "float16" in found[0][1]


def test_single_refuses_two_processes() -> None:
    for found in run_ranks(refused, 2, "single", {}):
        assert found == [("backend", "trains in one process, and there are 2")]


def test_tf32_is_refused_on_a_cpu() -> None:
    assert refused("ddp", {"precision": "tf32"}) == [("precision", "cpu has no TF32")]
    assert torch.get_num_threads() == 1
