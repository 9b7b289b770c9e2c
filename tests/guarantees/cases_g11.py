"""G11: a signal to the parent or any process, at any moment: a checkpoint, the right exit code, in time, no rest."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from guarantees.supervised import WORDS, Program, held, require, slack

#: `dealt`: the first process waits for the data of all.
MOMENTS = ("step", "start", "data", "evaluation", "save", "second", "dealt")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
TARGETS = ("parent", "rank0", "rank1")
#: A step of 0.1 s, a save of a small model, two seconds.
_SECONDS = 5.0


@dataclass(frozen=True)
class Case:
    number: int
    moment: str
    target: str
    nproc: int
    delay: float

    def __str__(self) -> str:
        return f"{signal.Signals(self.number).name}-{self.moment}-{self.target}-of-{self.nproc}"


def cases(count: int, seed: int) -> list[Case]:
    draw = random.Random(seed)
    found = []
    for number in range(count):
        nproc = 1 if number % 5 == 3 else 2
        target = "parent" if nproc == 1 else TARGETS[number % 3]
        moment = MOMENTS[number % len(MOMENTS)]
        found.append(Case(SIGNALS[(number + number // 4) % 4], moment, target, nproc, draw.random() * 0.3))
    return found


def run(case: Case, folder: Path) -> str | None:
    return held(lambda: _run(case, folder))


def _run(case: Case, folder: Path) -> None:
    words = [*WORDS, f"launch.nproc_per_node={case.nproc}", "hooks.slow={_target_: trouble.Slow}", "train.steps=400"]
    code = 130 if case.number == signal.SIGINT else 75
    if case.moment in ("data", "dealt"):
        words += ["data.train={_target_: trouble.Data, what: sleep}", "data.num_workers=1", "data.eval=null"]
        words += ["data.reader=main"] if case.moment == "dealt" else []
    if case.moment == "evaluation":
        words += ["eval.every=2", "data.eval.samples=200000", "batch.global_size=8"]
    if case.moment == "save":
        words += ["checkpoint.every.steps=1"]
    program = Program(folder, tuple(words))
    try:
        if case.moment == "start":
            time.sleep(0.2 + 8 * case.delay)
            if case.target != "parent":
                program.wait_for(lambda: len(program.ranks()) == 2)
        elif case.moment in ("data", "dealt"):
            # The worker sleeps over its sample: nothing is recorded any more.
            program.wait_for(lambda: program.records() > 0 and _stands_still(program))
        elif case.moment == "evaluation":
            status = program.run / "status.json"
            program.wait_for(lambda: status.exists() and '"evaluating"' in status.read_text())
        else:
            program.wait_for(lambda: program.records() > 2)
            time.sleep(case.delay)
        program.send(case.number, case.target)
        if case.moment == "second":
            code = _second(case, program)
        seen = program.end(30)
    finally:
        program.kill()
    require(seen.code == code, f"exit code {seen.code}, not {code}", seen)
    require("Traceback" not in seen.err, "a traceback", seen)
    if case.moment in ("start", "second"):
        return
    require(seen.seconds < _SECONDS * slack(), f"took {seen.seconds:.1f} s", seen)
    steps = seen.steps
    require(steps == list(range(1, len(steps) + 1)), f"records {steps}", seen)
    require(seen.json("summary.json").get("status") == "interrupted", "summary.json", seen)
    saved = sorted(path.name for path in (seen.run / "checkpoints").glob("step_*"))
    require(saved and saved[-1] == f"step_{steps[-1]:08d}", f"{saved} at step {steps[-1]}", seen)


def _second(case: Case, program: Program) -> int:
    """The same signal once more, to the parent: later than what a scheduler sends to all processes at once."""
    time.sleep(0.02)
    if program.process.poll() is None:
        program.send(case.number, "parent")
        return _either(program, 130 if case.number == signal.SIGINT else 143, case)
    return program.process.returncode


def _either(program: Program, at_once: int, case: Case) -> int:
    """The run may have been over before the second signal came."""
    orderly = 130 if case.number == signal.SIGINT else 75
    try:
        return orderly if program.process.wait(10) == orderly else at_once
    finally:
        require(time.monotonic() - program.asked < 3, "a second signal took long")


def _stands_still(program: Program) -> bool:
    before = program.records()
    time.sleep(1.0)
    return program.records() == before
