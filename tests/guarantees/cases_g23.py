"""G23: ten seconds after any kill no process is left, and no file outside of the run's folder."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from guarantees.supervised import WORDS, Program, held, require

MOMENTS = ("early", "start", "steps", "worker")
TARGETS = ("parent", "rank", "all")


@dataclass(frozen=True)
class Case:
    moment: str
    target: str
    delay: float

    def __str__(self) -> str:
        return f"{self.target}-{self.moment}"


def cases(count: int, seed: int) -> list[Case]:
    draw = random.Random(seed)
    return [Case(MOMENTS[n % 4], TARGETS[(n + n // 4) % 3], draw.random()) for n in range(count)]


def run(case: Case, folder: Path) -> str | None:
    return held(lambda: _run(case, folder))


def _run(case: Case, folder: Path) -> None:
    words = [*WORDS, "launch.nproc_per_node=2", "train.steps=400", "hooks.slow={_target_: trouble.Slow}"]
    if case.moment == "worker":
        words += ["data.num_workers=2"]
    program = Program(folder, tuple(words))
    try:
        if case.moment == "early":
            time.sleep(case.delay)
        elif case.moment == "start":
            program.wait_for(lambda: len(program.ranks()) == 2)
            time.sleep(3 * case.delay)
        else:
            program.wait_for(lambda: program.records() > 1)
        ranks = program.ranks()
        targets = {"parent": [program.process.pid], "rank": ranks[-1:], "all": [*ranks, program.process.pid]}
        for pid in targets[case.target]:
            os.kill(pid, signal.SIGKILL)
        program.process.wait(20)
        program.check_litter()
    finally:
        program.kill()
    allowed = {"r", "tmp", "trouble.py", "__pycache__"}
    require({path.name for path in folder.iterdir()} <= allowed, f"{sorted(path.name for path in folder.iterdir())}")
