"""G4: what retention lets go, of random listings, against the sentences of the promise; and all writes of a run."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Case:
    """The steps that are there; which of them `best` and `resume` name."""

    steps: tuple[int, ...]
    keep: int
    named: frozenset[int]
    milestones: int | None

    def __str__(self) -> str:
        return f"{len(self.steps)} steps, keep {self.keep}, {sorted(self.named)}, milestones {self.milestones}"


@dataclass(frozen=True)
class Run:
    """A run of two processes that each write a part, and one that goes on from it."""

    waits: bool

    def __str__(self) -> str:
        return f"a run of two processes, {'waits' if self.waits else 'beside'}"


def cases(count: int, seed: int) -> list[Case | Run]:
    """Two runs, then listings."""
    rng = random.Random(seed)
    found: list[Case | Run] = [Run(True), Run(False)][:count]
    while len(found) < count:
        steps = sorted(rng.sample(range(rng.choice([12, 200, 10**9])), rng.randrange(12)))
        named = frozenset(step for step in (rng.choice([*steps, -1]), rng.choice([*steps, -2])) if step >= 0)
        # Fewer than two are refused where they are configured; the function itself does not do it either.
        keep = rng.choice([0, 1, 2, 2, 3, 4, 7])
        found.append(Case(tuple(steps), keep, named, rng.choice([None, None, 1, 3, 50])))
    return found


def run(case: Case | Run, folder: Path) -> str | None:
    return _listed(case, folder) if isinstance(case, Case) else _traced(case, folder)


def _traced(case: Run, folder: Path) -> str | None:
    """Nothing of either start writes into what is there, and each checkpoint goes after two newer ones came."""
    from guarantees.writes import told

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "writes.py", folder)
    words = ["+recipe=smoke", "run_dir=run", "device=cpu", "launch.nproc_per_node=2", "backend=fsdp", "eval.every=3"]
    words += ["checkpoint.every.steps=2", "checkpoint.best.metric=loss", "checkpoint.best.mode=min"]
    words += ["checkpoint.milestones=6", f"checkpoint.async={str(not case.waits).lower()}"]
    words += ["hooks.trace={_target_: writes.Trace, folder: run/checkpoints, log: log}"]
    for steps in (10, 16):
        done = subprocess.run(
            [sys.executable, "-m", "runner", *words, f"train.steps={steps}"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            return f"{steps} steps: exit code {done.returncode}: {done.stderr[-1500:]}"
    heard = told(folder / "log")
    there = {path.name for path in (folder / "run" / "checkpoints").iterdir()}
    if heard["violation"]:
        return f"{heard['violation'][:5]}"
    due = {f"step_{step:08d}" for step in range(2, 17, 2)}
    if not due <= set(heard["published"]) or there != set(heard["published"]) - set(heard["gone"]):
        return f"it heard {heard}, and there are {sorted(there)}"
    parts = sorted(path.name for path in (folder / "run" / "checkpoints" / "step_00000016").glob("*.safetensors"))
    if parts != ["rank_0.safetensors", "rank_1.safetensors"] or len(heard["gone"]) < 4:
        return f"{parts}, gone {heard['gone']}"
    return None


def _listed(case: Case, folder: Path) -> str | None:
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
