"""The batch equation with several processes."""

from __future__ import annotations

from typing import Any

import pytest

from runner.recipe.validate import validate


def checked(world: int, **batch: Any) -> tuple[dict[str, Any], list[tuple[str | None, str, str]]]:
    """The configuration with derived keys, and (key, why, fix) of what is wrong with it."""
    steps = batch.pop("steps", None)
    config = {"batch": {"micro_size": None, **batch}, "accumulation": {"steps": steps}}
    problems = validate(config, {}, partial=True, world=world)
    return config, [(problem.key, problem.why, problem.fix) for problem in problems]


@pytest.mark.parametrize(
    ("world", "given", "micro", "steps"),
    [
        (1, {"global_size": 48}, 48, 1),
        (2, {"global_size": 48}, 24, 1),
        (3, {"global_size": 48, "steps": 4}, 4, 4),
        (4, {"global_size": 48, "micro_size": 3}, 3, 4),
        (4, {"global_size": 48, "micro_size": 6, "steps": 2}, 6, 2),
        (2, {"global_size": 48, "micro_size": "auto"}, "auto", None),
    ],
)
def test_what_is_not_given_is_derived(world: int, given: dict[str, Any], micro: Any, steps: Any) -> None:
    config, problems = checked(world, **given)
    assert problems == []
    assert (config["batch"]["micro_size"], config["accumulation"]["steps"]) == (micro, steps)


@pytest.mark.parametrize(
    ("world", "given", "key", "equation", "fix"),
    [
        (
            3,
            {"global_size": 32},
            "batch.global_size",
            "32 = ? x ? x 3",
            "launch.nproc_per_node=2; or, another training, batch.global_size=30 or batch.global_size=33",
        ),
        (
            2,
            {"global_size": 1},
            "batch.global_size",
            "1 = ? x ? x 2",
            "launch.nproc_per_node=1; or, another training, batch.global_size=2",
        ),
        (2, {"global_size": 32, "steps": 3}, "accumulation.steps", "32 = ? x 3 x 2", "accumulation.steps=2 or"),
        (4, {"global_size": 32, "micro_size": 5}, "batch.micro_size", "32 = 5 x ? x 4", "batch.micro_size=4 or"),
        (
            2,
            {"global_size": 32, "micro_size": 32, "steps": 1},
            "batch",
            "32 is not 32 x 1 x 2 = 64",
            "batch.micro_size=16",
        ),
        (1, {"global_size": 32, "micro_size": "auto", "steps": 2}, "accumulation.steps", "decides it", "leave"),
        (
            3,
            {"global_size": 32, "micro_size": "auto"},
            "batch.global_size",
            "32 = ? x ? x 3",
            "launch.nproc_per_node=2",
        ),
    ],
)
def test_what_does_not_divide_shows_the_equation(
    world: int, given: dict[str, Any], key: str, equation: str, fix: str
) -> None:
    _, problems = checked(world, **given)
    assert len(problems) == 1, problems
    assert problems[0][0] == key
    assert equation in problems[0][1]
    assert fix in problems[0][2]
