"""G2, elastic bits: any sequence of world sizes, with interruptions, gives the bits of one process.

Without `determinism: canonical` it gives the same samples in each step, and the losses to rounding.
"""

from __future__ import annotations

import atexit
import json
import math
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
    # Which elements drop out would follow the number of processes.
    "default": ("determinism=default", "model.dropout=0", "train.steps=50", "optimizer.lr=1e-3"),
}
WORLDS = (1, 2, 4)
SECONDS = 120.0
#: Steps of a run, and of one whose losses are compared.
STEPS, LONGER = 22, 50
#: How far losses may be apart there.
ROUNDING = 1e-6
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

    def words(self, place: int) -> list[str]:
        how = f"{{_target_: elastic.Interrupt, step: {self.step}, number: {self.number}, rank: {self.rank}"
        return [
            f"launch.nproc_per_node={self.world}",
            f"data.num_workers={self.workers}",
            f"hooks.interrupt={how}, seconds: {self.seconds}, start: {place}}}",
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
        precision = list(PRECISIONS)[number % 4]
        stops = sorted(draw.sample(range(1, steps_of(precision)), draw.randint(1, 3)))
        # Where the first one is alone, it meets another world all the same.
        world, stages = draw.choice(WORLDS[1:]), []
        for step in stops:
            which = draw.choice((signal.SIGTERM, signal.SIGKILL))
            seconds = draw.choice((0.0, draw.uniform(0.0, 0.03)))
            stages.append(Stage(world, int(which), step, draw.randrange(world), seconds, draw.choice((0, 0, 2))))
            world = draw.choice([other for other in WORLDS if other != world])
        found.append(Case(precision, (*stages, Stage(world))))
    return found


def steps_of(precision: str) -> int:
    return LONGER if precision == "default" else STEPS


def run(case: Case, folder: Path) -> str | None:
    """None where all bits are those of one process that nobody interrupted, else what differs."""
    try:
        expected = _reference(case.precision)
        for place, stage in enumerate(case.stages):
            ended = _ended(folder, case.precision)
            code, said = start(folder, case.precision, stage, place)
            if (wrong := _wrong(case, stage, place, code, ended, folder)) is not None:
                return f"{case}: start {place + 1}: {wrong}\n{said}"
        found = outcome(folder, case.precision)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return f"{case}: {type(error).__name__}: {error}"
    if case.precision == "default":
        return None if (far := _apart(expected, found)) is None else f"{case}: {far}"
    for part, values in expected.items():
        if found[part] != values:
            return f"{case}: {part}: {_difference(values, found[part])}"
    return None


def _wrong(case: Case, stage: Stage, place: int, code: int, ended: bool, folder: Path) -> str | None:
    """What is wrong with how a start ended: it came to its step, and ended as the signal demands."""
    interrupted = [line for line in _lines(folder / "interrupted") if line["start"] == place]
    last = max((record["step"] for record in _lines(folder / "run" / "metrics.jsonl")), default=0)
    if not stage.number or ended:
        # The one before may have come to its end before its signal.
        return f"exit code {code}" if code or interrupted else None
    if len(interrupted) != 1 or interrupted[0]["step"] < stage.step:
        return f"it was not interrupted at step {stage.step}: {interrupted}, exit code {code}"
    if code == 0 and _ended(folder, case.precision):
        # The last step was under way when the signal came.
        near = stage.seconds or interrupted[0]["step"] >= steps_of(case.precision) - 1
        return None if near else f"it went on after signal {stage.number} at step {interrupted[0]['step']}"
    # A process alone dies of the signal itself, a parent of several fails.
    killed = -signal.SIGKILL if stage.world == 1 else 1
    if code != (75 if stage.number == signal.SIGTERM else killed):
        return f"exit code {code} after signal {stage.number}"
    if stage.number == signal.SIGTERM and last < stage.step:
        return f"the records end at step {last}"
    return None


def _ended(folder: Path, precision: str) -> bool:
    """Whether a run has come to its last step, and says so."""
    try:
        status = json.loads((folder / "run" / "status.json").read_text())
    except FileNotFoundError:
        return False
    return status["state"] == "completed" and status["step"] == steps_of(precision)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def start(folder: Path, precision: str, stage: Stage, place: int = 0) -> tuple[int, str]:
    """The exit code of one start in `folder`, and what it said."""
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "elastic.yaml", folder / "recipes")
    shutil.copy(HERE / "elastic.py", folder)
    words = ["+recipe=elastic", "run_dir=run", "device=cpu", *PRECISIONS[precision], *stage.words(place)]
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


def outcome(folder: Path, precision: str) -> dict[str, Any]:
    """All records of a run without clocks, each step's samples, every tensor of the last checkpoint but generators."""
    from guarantees.kills import tensors

    path = folder / "run"
    lines = (path / "metrics.jsonl").read_text().splitlines()
    records = [{key: value for key, value in json.loads(line).items() if not key.endswith(_CLOCKS)} for line in lines]
    last = path / "checkpoints" / f"step_{steps_of(precision):08d}"
    saved = {name: value for name, value in tensors(last).items() if not name.startswith("random")}
    if not any(name.startswith("optimizer") for name in saved):
        raise ValueError(f"no optimizer in {last}")
    return {"records": records, "samples": _samples(folder, steps_of(precision)), "tensors": saved}


def _samples(folder: Path, steps: int) -> list[list[int]]:
    """The samples that each step had in the last start that made it, of all ranks."""
    lines = _lines(folder / "samples")
    starts = {line["step"]: line["start"] for line in sorted(lines, key=lambda line: line["start"])}
    found: list[list[int]] = [[] for _ in range(steps)]
    for line in lines:
        if starts[line["step"]] == line["start"]:
            found[line["step"] - 1] += line["samples"]
    return [sorted(samples) for samples in found]


def _apart(expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """What differs by more than rounding: the samples of a step, or the records in their losses."""
    if found["samples"] != expected["samples"]:
        return f"samples: {_difference(expected['samples'], found['samples'])}"
    if len(found["records"]) != len(expected["records"]):
        return f"records: {_difference(expected['records'], found['records'])}"
    for one, other in zip(expected["records"], found["records"], strict=True):
        if (one["split"], one["step"]) != (other["split"], other["step"]):
            return f"records: {one}, found {other}"
        if not math.isclose(one["loss"], other["loss"], rel_tol=ROUNDING, abs_tol=0.0):
            return f"losses of step {one['step']}: {one['loss']!r}, found {other['loss']!r}"
    return None


@cache
def _reference(precision: str) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="elastic-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    code, said = start(folder, precision, Stage(1))
    if code:
        raise ValueError(f"one process: exit code {code}\n{said}")
    return outcome(folder, precision)


def _difference(expected: Any, found: Any) -> str:
    if isinstance(expected, dict):
        names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        return f"{len(names)} of {len(expected)} differ: {', '.join(names[:5])}"
    pairs = zip(expected, found, strict=False)
    first = next(((a, b) for a, b in pairs if a != b), None)
    return f"{len(expected)} records, found {len(found)}" if first is None else f"{first[0]}, found {first[1]}"
