"""The environment that is read, and plans that travel to a worker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runner.errors import InputError
from runner.launch.environment import Environment
from runner.launch.worker import WorkPlan, entry


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "HYDRA_FULL_ERROR", "TERM"):
        monkeypatch.delenv(name, raising=False)


def test_an_empty_environment() -> None:
    found = Environment.read()
    assert found == Environment(1, False, None)
    assert found.check() == []


@pytest.mark.parametrize(("text", "full"), [("", False), ("0", False), ("1", True), ("true", True)])
def test_full_errors(monkeypatch: pytest.MonkeyPatch, text: str, full: bool) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", text)
    assert Environment.read().full_error is full


def test_a_launcher_with_more_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    (problem,) = Environment.read().check()
    assert "WORLD_SIZE=2" in problem.why
    assert problem.fix


def test_a_world_size_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="WORLD_SIZE=two"):
        Environment.read()


@pytest.mark.parametrize("text", ["0", "-1"])
def test_a_world_size_that_cannot_be(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    assert Environment.read().check()


def plan(**more: Any) -> WorkPlan:
    values: dict[str, Any] = {
        "config": {"a": [1, 2.5, None, True], "ü": {"b": "c"}},
        "written": {"a": "${b}"},
        "command": ["+recipe=x", "a='b c'"],
        "directory": "/tmp/x y",
        "started": 1234.5678,
    }
    return WorkPlan(**{**values, **more})


def test_a_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    made = plan(marks={"a.b": ["f.yaml", 1, 2]}, run_dir="r", terminal="xterm", full_error=True)
    made.save(tmp_path / "plan.json")
    assert WorkPlan.load(tmp_path / "plan.json") == made


def test_an_entry_point_is_found_by_name() -> None:
    assert entry("runner.launch.worker:entry") is entry


def test_a_worker_calls_its_entry_and_exits_with_its_code(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def work(plan):\n    print(plan.config['x'])\n    return 7\n")
    plan(config={"x": "seen"}).save(tmp_path / "plan.json")
    done = subprocess.run(
        [sys.executable, "-m", "runner.launch.worker", "mine:work", "plan.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "seen\n", "")


def test_a_worker_starts_without_torch_and_hydra(tmp_path: Path) -> None:
    program = (
        "import runner.launch.worker, sys, json\n"
        "print(json.dumps([m for m in ('torch', 'hydra', 'omegaconf') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert json.loads(done.stdout) == []
