"""G12: a hang is found in time, the process that the others wait for is named, and all stacks are in one file."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

from guarantees.supervised import WORDS, Program, held, require, slack

KINDS = ("sleep", "gil", "stop", "collective", "worker")
TIMEOUT = 3.0


@dataclass(frozen=True)
class Case:
    kind: str
    rank: int
    step: int
    nproc: int = 2

    def __str__(self) -> str:
        return f"{self.kind}-rank{self.rank}-of-{self.nproc}"


def cases(count: int, seed: int) -> list[Case]:
    draw = random.Random(seed)
    return [Case(KINDS[number % 5], (number // 5 + 1) % 2, draw.randint(2, 6)) for number in range(count)]


#: A process that nobody watches.
ALONE = [Case("sleep", 0, 3, 1), Case("gil", 0, 3, 1), Case("worker", 0, 3, 1)]


def run(case: Case, folder: Path) -> str | None:
    return held(lambda: _run(case, folder))


def _run(case: Case, folder: Path) -> None:
    words = [*WORDS, f"launch.nproc_per_node={case.nproc}", f"launch.timeout={TIMEOUT}", "train.steps=60"]
    if case.kind == "worker":
        words += ["data.train={_target_: trouble.Data, what: sleep}", "data.num_workers=1"]
    else:
        words += [f"hooks.bad={{_target_: trouble.Trouble, what: {case.kind}, rank: {case.rank}, step: {case.step}}}"]
    program = Program(folder, tuple(words))
    try:
        seen = program.end(60)
    finally:
        program.kill()
    took = time.time() - (folder / "began").stat().st_mtime
    require(took < TIMEOUT + slack(), f"found after {took:.1f} s", seen)
    require(seen.code == 1, f"exit code {seen.code}", seen)
    stacks = (seen.run / "logs" / "stacks.txt").read_text()
    stacks_of = stacks.count(" in _run_module_as_main")
    require(stacks_of >= case.nproc, f"stacks of {stacks_of}", seen)
    if case.nproc == 1 and case.kind == "gil":
        require("trouble.py" in stacks and "trouble.py" in seen.err, "its stack", seen)
        return
    require("hang: no progress for 3 s (launch.timeout)" in seen.last, "the last line", seen)
    if case.nproc > 1 and case.kind not in ("worker", "collective"):
        require(f"rank {case.rank} on" in seen.last, "the process that lags", seen)
        require(f"(step {case.step + 1})" in seen.last or f"(step {case.step})" in seen.last, "its step", seen)
    if case.kind == "worker":
        require("waiting for data" in seen.last, "its phase", seen)
    if case.kind == "stop":
        require("stopped (SIGSTOP)" in seen.last, "that it was stopped", seen)
    require("hang" in seen.json("summary.json").get("error", ""), "summary.json", seen)
