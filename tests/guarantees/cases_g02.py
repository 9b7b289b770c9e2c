"""G2, elastic bits: any sequence of world sizes, with interruptions, gives the bits of one process."""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

PRECISIONS = {
    "fp32": (),
    "bf16": ("precision=bf16",),
    # Overflows on the way, and a scale that grows again.
    "fp16": ("precision=fp16", "precision.loss_scaling.init_scale=1e7", "precision.loss_scaling.growth_interval=5"),
}
WORLDS = (1, 2, 4)
STEPS, SECONDS = 22, 120.0
#: What differs between two runs of the same: clocks.
_CLOCKS = ("time", "seconds", "per_second")


@dataclass(frozen=True)
class Stage:
    """A start with so many processes; a signal hits one of them, a moment after a step. No signal: to the end."""

    world: int
    number: int = 0
    step: int = 0
    rank: int = 0
    seconds: float = 0.0
    workers: int = 0

    def words(self) -> list[str]:
        how = f"{{_target_: elastic.Interrupt, step: {self.step}, number: {self.number}, rank: {self.rank}"
        return [
            f"launch.nproc_per_node={self.world}",
            f"data.num_workers={self.workers}",
            f"hooks.interrupt={how}, seconds: {self.seconds}}}",
        ]


@dataclass(frozen=True)
class Case:
    """A precision, and the starts one after the other."""

    precision: str
    stages: tuple[Stage, ...]

    def __str__(self) -> str:
        names = {0: "end", signal.SIGTERM: "term", signal.SIGKILL: "kill"}
        return "-".join([self.precision, *(f"{s.world}{names[s.number]}{s.step or ''}" for s in self.stages)])


def cases(count: int, seed: int) -> list[Case]:
    """Worlds in a random order, each other than the one before; one to three interruptions, at any step."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        stops = sorted(draw.sample(range(1, STEPS), draw.randint(1, 3)))
        # Where the first one is alone, it meets another world all the same.
        world, stages = draw.choice(WORLDS[1:]), []
        for step in stops:
            which = draw.choice((signal.SIGTERM, signal.SIGKILL))
            seconds = draw.choice((0.0, draw.uniform(0.0, 0.03)))
            stages.append(Stage(world, int(which), step, draw.randrange(world), seconds, draw.choice((0, 0, 2))))
            world = draw.choice([other for other in WORLDS if other != world])
        found.append(Case(list(PRECISIONS)[number % 3], (*stages, Stage(world))))
    return found


def run(case: Case, folder: Path) -> str | None:
    """None where all bits are those of one process that nobody interrupted, else what differs."""
    try:
        expected = _reference(case.precision)
        for stage in case.stages:
            code, said = start(folder, case.precision, stage)
            # An interruption may come after the end, or kill what has just been saved.
            if not stage.number and code:
                return f"{case}: exit code {code}\n{said}"
        found = outcome(folder / "run")
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return f"{case}: {type(error).__name__}: {error}"
    for part, values in expected.items():
        if found[part] != values:
            return f"{case}: {part}: {_difference(values, found[part])}"
    return None


def start(folder: Path, precision: str, stage: Stage) -> tuple[int, str]:
    """The exit code of one start in `folder`, and what it said."""
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "elastic.yaml", folder / "recipes")
    shutil.copy(HERE / "elastic.py", folder)
    words = ["+recipe=elastic", "run_dir=run", "device=cpu", *PRECISIONS[precision], *stage.words()]
    done = subprocess.run(
        [sys.executable, "-m", "runner", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.returncode, (done.stdout + done.stderr)[-3000:]


def outcome(path: Path) -> dict[str, Any]:
    """All records of a run without clocks, and every tensor of its last checkpoint but for generators."""
    from guarantees.kills import tensors

    lines = (path / "metrics.jsonl").read_text().splitlines()
    records = [{key: value for key, value in json.loads(line).items() if not key.endswith(_CLOCKS)} for line in lines]
    last = path / "checkpoints" / f"step_{STEPS:08d}"
    saved = {name: value for name, value in tensors(last).items() if not name.startswith("random")}
    if not any(name.startswith("optimizer") for name in saved):
        raise ValueError(f"no optimizer in {last}")
    return {"records": records, "tensors": saved}


@cache
def _reference(precision: str) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="elastic-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    code, said = start(folder, precision, Stage(1))
    if code:
        raise ValueError(f"one process: exit code {code}\n{said}")
    return outcome(folder / "run")


def _difference(expected: Any, found: Any) -> str:
    if isinstance(expected, dict):
        names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        return f"{len(names)} of {len(expected)} differ: {', '.join(names[:5])}"
    pairs = zip(expected, found, strict=False)
    first = next(((a, b) for a, b in pairs if a != b), None)
    return f"{len(expected)} records, found {len(found)}" if first is None else f"{first[0]}, found {first[1]}"
