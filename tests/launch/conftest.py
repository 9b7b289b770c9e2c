"""Parents that end with their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from parents import Parent

from runner.launch.worker import WorkPlan


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Parent]]:
    """Starts `works:work` in several processes: start(2, do="raise_", variables={…}, plan={fields of the plan})."""
    parents: list[Parent] = []

    def start(nproc: int, *, variables: dict[str, str] | None = None, plan: Any = None, **config: Any) -> Parent:
        folder = tmp_path / f"{len(parents)}"
        (folder / "tmp").mkdir(parents=True)
        values = {"config": {"name": "mlp", **config}, "written": {}, "command": [], "directory": str(folder)}
        parents.append(Parent(folder, nproc, WorkPlan(**{**values, "started": 0.0, **(plan or {})}), variables or {}))
        return parents[-1]

    yield start
    for parent in parents:
        parent.process.kill()
        parent.process.communicate()
