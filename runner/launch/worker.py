"""One process of a run: takes a finished plan, never composes one.

`python -m runner.launch.worker MODULE:FUNCTION PLAN.json` calls the function with the plan and exits with its code;
the entry point is handed in, so that this room knows nothing of what is run.
"""

from __future__ import annotations

import importlib
import json as json_module  # a plan has a field of that name
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class WorkPlan:
    """All that a process needs to know: plain values that travel as JSON.

    `config` is complete and resolved; `written` is the same with interpolations as they were written; `marks` says
    where each key stands; `started` is the time (seconds since 1970) at which the program was started.
    """

    config: dict[str, Any]
    written: dict[str, Any]
    command: list[str]
    directory: str
    started: float
    marks: dict[str, list[Any]] = field(default_factory=dict)
    run_dir: str | None = None
    terminal: str | None = None
    full_error: bool = False
    json: bool = False

    def save(self, path: Path) -> None:
        path.write_text(json_module.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> WorkPlan:
        return cls(**json_module.loads(path.read_text(encoding="utf-8")))


Work = Callable[[WorkPlan], int]


def entry(name: str) -> Work:
    """The function behind MODULE:FUNCTION."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def main(arguments: list[str]) -> int:
    work, plan = arguments
    return entry(work)(WorkPlan.load(Path(plan)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
