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

from guarantees.kills import (
    CELLS,
    MOMENTS,
    TARGETS,
    Kill,
    Known,
    Missed,
    Outcome,
    Start,
    Violated,
    reference,
    survive,
)


@dataclass(frozen=True)
class Case:
    """A cell, how it saves, its data workers, and the kills on the way."""

    cell: str
    saves: str
    workers: int
    kills: tuple[Kill, ...]

    def __str__(self) -> str:
        kills = "-".join(f"{kill.target}@{kill.moment}" for kill in self.kills)
        return f"{self.cell}-{self.saves}{'-workers' if self.workers else ''}-{kills}"


def cases(count: int, seed: int) -> list[Case]:
    """All cells in turn; saves, moments and targets in turn as well, so that few cases already meet each."""
    draw = random.Random(seed)
    moments, targets = _turns(MOMENTS, draw), _turns(TARGETS, draw)
    found = []
    for number in range(count):
        cell = CELLS[number % len(CELLS)]
        saves = ("async", "sync")[(number + number // len(CELLS)) % 2]
        kills = [
            Kill(
                next(moments),
                draw.random(),
                draw.choice((0.0, 0.002, 0.02)) * draw.random(),
                next(targets),
                rank,
                draw.random(),
            )
            for rank in draw.sample((0, 1, 0, 1), draw.choice((1, 1, 1, 2, 3)))
        ]
        # By the clock a kill may hit what comes after the last save, and then there is nothing left for another.
        kills.sort(key=lambda kill: kill.moment == "any")
        found.append(Case(cell, saves, int(number % 10 == 9), tuple(kills)))
    return found


def _turns(values: tuple[str, ...], draw: random.Random):  # type: ignore[no-untyped-def]
    """Each value once in an order that is drawn, again and again."""
    while True:
        yield from draw.sample(values, len(values))


def run(case: Case, folder: Path) -> str | None:
    """None where every kill landed and the run came to the same bits, else what differed."""
    words = (f"checkpoint.async={str(case.saves == 'async').lower()}", f"data.num_workers={case.workers}")
    start = Start.of(case.cell, *words)
    try:
        # Saves in the background and data workers change nothing, so all have one reference.
        expected, known = _reference(case.cell)
        try:
            told = survive(start, case.kills, folder / "killed", expected, known)
        except Missed as missed:
            # By the clock it was too late today; a step cannot be missed. What was missed counts for nothing.
            kills = list(case.kills)
            kills[missed.number] = replace(kills[missed.number], moment="step")
            told = survive(start, kills, folder / "again", expected, known)
    except (Violated, Missed) as error:
        return f"{case}: {error}"
    return None if len(told) == len(case.kills) else f"{case}: only {'; '.join(told)}"


@cache
def _reference(cell: str) -> tuple[Outcome, Known]:
    folder = Path(tempfile.mkdtemp(prefix="uninterrupted-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return reference(Start.of(cell, "checkpoint.async=false"), folder / "run")
