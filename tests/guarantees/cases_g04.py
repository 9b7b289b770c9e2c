"""G4: what retention lets go, of random listings, against the sentences of the promise."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """The steps that are there; which of them `best` and `resume` name."""

    steps: tuple[int, ...]
    keep: int
    named: frozenset[int]
    milestones: int | None

    def __str__(self) -> str:
        return f"{len(self.steps)} steps, keep {self.keep}, {sorted(self.named)}, milestones {self.milestones}"


def cases(count: int, seed: int) -> list[Case]:
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        steps = sorted(rng.sample(range(rng.choice([12, 200, 10**9])), rng.randrange(12)))
        named = frozenset(step for step in (rng.choice([*steps, -1]), rng.choice([*steps, -2])) if step >= 0)
        # Fewer than two are refused where they are configured; the function itself does not do it either.
        keep = rng.choice([0, 1, 2, 2, 3, 4, 7])
        found.append(Case(tuple(steps), keep, named, rng.choice([None, None, 1, 3, 50])))
    return found


def run(case: Case, folder: Path) -> str | None:
    from runner.checkpoint import store

    paths = [store.path_of(folder, step) for step in case.steps]
    named = {store.path_of(folder, step) for step in case.named}
    gone = store.expired(paths, case.keep, named, case.milestones)
    left = [path for path in paths if path not in gone]
    newest = paths[-max(case.keep, 2) :]
    if len(set(gone)) != len(gone) or not set(gone) <= set(paths):
        return "goes twice, or was not there"
    if not set(newest) <= set(left):
        return f"of the newest {newest} only {left} stay"
    if len(left) < min(2, len(paths)):
        return f"only {left} stay"
    if named & set(gone):
        return "one that is named goes"
    kept_for_ever = {path for path in paths if case.milestones and store.step_of(path) % case.milestones == 0}
    if kept_for_ever & set(gone):
        return "a milestone goes"
    more = set(left) - set(newest) - named - kept_for_ever
    return f"{more} stay for no reason" if more else None
