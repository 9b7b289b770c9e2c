"""Every recipe composes and trains two steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.__main__ import main
from runner.places import BUILTIN

RECIPES = sorted(path.stem for path in (BUILTIN / "recipes").glob("*.yaml"))

#: What keeps two steps of a recipe short.
SHORT = {"bert_sst2": ["data.held_out=64"]}


def test_all_recipes_are_known() -> None:
    assert RECIPES == ["bert_sst2", "mlp_synthetic", "smoke"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.network if n == "bert_sst2" else ()) for n in RECIPES]
)
def test_a_recipe_trains_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([f"+recipe={name}", "train.steps=2", "log.every=1", "run_dir=r", *SHORT.get(name, [])]) == 0
    records = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [(record["split"], record["step"]) for record in records] == [("train", 1), ("train", 2), ("eval", 2)]
    assert all(0 < record["loss"] < 3 for record in records)
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("completed", 2)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_is(name: str) -> None:
    lines = (BUILTIN / "recipes" / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    assert lines[1] == f"# python -m runner +recipe={name}"
    assert f"name: {name}" in lines
