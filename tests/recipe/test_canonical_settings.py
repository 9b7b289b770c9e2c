"""`determinism: canonical` in a configuration: what it decides, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from runner.recipe.canonical import settle, shards


def configured(size: Any = 32, *, micro: Any = None, steps: Any = None, **more: Any) -> dict[str, Any]:
    batch = {"global_size": size, "micro_size": micro}
    return {"batch": batch, "accumulation": {"steps": steps}, "launch": {"threads": None}, **more}


@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 2), (6, 2), (12, 4), (24, 8), (64, 8), (63, 1), (1000, 8)])
def test_shards_follow_the_global_size_alone(size: int, count: int) -> None:
    assert shards(size) == count


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_micro_batch_follows(world: int) -> None:
    config = configured()
    assert not list(settle(config, world))
    assert config["batch"]["micro_size"] == 4
    assert config["accumulation"]["steps"] == 8 // world
    assert config["launch"]["threads"] == 1
    # What was derived once is right when it is given.
    assert not list(settle(config, world))


@pytest.mark.parametrize(
    ("config", "world", "key", "fix"),
    [
        (configured(), 3, "determinism", "launch.nproc_per_node=2"),
        (configured(), 16, "determinism", "launch.nproc_per_node=8"),
        (
            configured(30),
            4,
            "determinism",
            "launch.nproc_per_node=2; or, another training, batch.global_size=28 or batch.global_size=32",
        ),
        (configured(micro=8), 1, "batch.micro_size", "leave it out"),
        (configured(micro="auto"), 1, "batch.micro_size", "leave it out"),
        (configured(steps=2), 2, "accumulation.steps", "leave it out"),
        (configured(launch={"threads": 2}), 1, "launch.threads", "leave it out"),
        (configured(backend={"name": "fsdp"}), 2, "determinism", "backend=auto, or leave determinism out"),
        (configured(backend={"name": "deepspeed"}), 2, "determinism", "backend=auto, or leave determinism out"),
        (configured(compile=True), 1, "determinism", "compile=false, or leave determinism out"),
    ],
)
def test_what_contradicts_is_told_with_what_would_work(config: Any, world: int, key: str, fix: str) -> None:
    ((found, why, advice, _),) = settle(config, world)
    assert (found, advice) == (key, fix)
    assert why


@pytest.mark.parametrize("size", [None, "a", 0, -3, 1.5, True])
def test_what_is_wrong_otherwise_is_told_elsewhere(size: Any) -> None:
    assert not list(settle(configured(size), 2))
    assert not list(settle(configured(32, micro="x"), 2))
