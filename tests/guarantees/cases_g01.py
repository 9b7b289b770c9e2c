"""G1: after SIGKILL of a rank, all ranks or the parent at any moment, the same command gives the same bits.

And G23: ten seconds after each of these kills no process is left, and no file outside of the run's folder.
"""

from __future__ import annotations

import atexit
import random
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from guarantees.kills import CELLS, MOMENTS, TARGETS, Kill, Known, Outcome, Start, Violated, reference, survive


@dataclass(frozen=True)
class Case:
    """A cell, how it saves, and the kills on the way."""

    cell: str
    saves: str
    kills: tuple[Kill, ...]

    def __str__(self) -> str:
        kills = "-".join(f"{kill.target}@{kill.moment}" for kill in self.kills)
        return f"{self.cell}-{self.saves}-{kills}"


def cases(count: int, seed: int) -> list[Case]:
    """All cells in turn; saves, moments and targets in turn as well, so that few cases already meet each."""
    draw = random.Random(seed)
    moments, targets = _turns(MOMENTS, draw), _turns(TARGETS, draw)
    found = []
    for number in range(count):
        cell = CELLS[number % len(CELLS)]
        saves = ("async", "sync")[(number + number // len(CELLS)) % 2]
        kills = tuple(
            Kill(next(moments), draw.random(), draw.choice((0.0, 0.002, 0.02)) * draw.random(), next(targets), rank)
            for rank in draw.sample((0, 1, 0, 1), draw.choice((1, 1, 2, 3)))
        )
        found.append(Case(cell, saves, kills))
    return found


def _turns(values: tuple[str, ...], draw: random.Random):  # type: ignore[no-untyped-def]
    """Each value once in an order that is drawn, again and again."""
    while True:
        yield from draw.sample(values, len(values))


def run(case: Case, folder: Path) -> str | None:
    """None where the killed run came to the same bits, else what differed."""
    start = Start.of(case.cell, f"checkpoint.async={str(case.saves == 'async').lower()}")
    try:
        # Saves in the background change nothing, so both kinds have one reference.
        expected, known = _reference(case.cell)
        if not survive(start, case.kills, folder / "killed", expected, known):
            # The run was over before the moment came; in the middle of its steps it cannot be.
            kill = replace(case.kills[0], moment="step", place=case.kills[0].place * 0.8)
            if not survive(start, [kill], folder / "again", expected, known):
                return "no kill hit the run"
    except Violated as error:
        return f"{case}: {error}"
    return None


@cache
def _reference(cell: str) -> tuple[Outcome, Known]:
    folder = Path(tempfile.mkdtemp(prefix="uninterrupted-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return reference(Start.of(cell, "checkpoint.async=false"), folder / "run")
