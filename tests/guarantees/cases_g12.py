"""G12: a hang is found in time, the process that the others wait for is named, and all stacks are in one file.

What is slow and goes on, nearly as long as the timeout at a time, is no hang.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

from guarantees.supervised import WORDS, Program, held, require, sample_of, slack

KINDS = ("sleep", "gil", "stop", "collective", "worker")
#: Something long right after a step as long.
SLOW = ("slow_step", "slow_data", "slow_evaluation", "slow_save")
TIMEOUT = 3.0
#: Seconds of the timeout in which what is slow takes 0.8 of it: the rest is for what else a step does.
_LONG = 4.0
_WORK = 0.8 * _LONG


@dataclass(frozen=True)
class Case:
    kind: str
    rank: int
    step: int
    nproc: int = 2

    def __str__(self) -> str:
        return f"{self.kind}-rank{self.rank}-of-{self.nproc}"


def cases(count: int, seed: int) -> list[Case]:
    """Of seven cases five are hangs, each in either process, and two are slow."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        turn, place = divmod(number, 7)
        if place < 5:
            found.append(Case(KINDS[place], (turn + 1) % 2, draw.randint(2, 6)))
        else:
            slow = 2 * turn + place - 5
            nproc = 1 if slow % 3 == 2 else 2
            found.append(Case(SLOW[slow % 4], (turn + 1) % nproc, 2, nproc))
    return found


#: A process that nobody watches.
ALONE = [Case("sleep", 0, 3, 1), Case("gil", 0, 3, 1), Case("worker", 0, 3, 1)]


def run(case: Case, folder: Path) -> str | None:
    return held(lambda: (_goes_on if case.kind in SLOW else _hangs)(case, folder))


def _goes_on(case: Case, folder: Path) -> None:
    slow = f"seconds: {_WORK}, rank: {case.rank}"
    words = [*WORDS, f"launch.nproc_per_node={case.nproc}", f"launch.timeout={_LONG}", "train.steps=4"]
    words += [f"hooks.slow={{_target_: trouble.Slow, {slow}, step: {case.step}}}"]
    if case.kind == "slow_step":
        words += [f"hooks.next={{_target_: trouble.Slow, {slow}, step: {case.step + 1}}}"]
    if case.kind == "slow_data":
        at = sample_of(case.step + 1, case.rank, case.nproc)
        words += [f"data.train={{_target_: trouble.Data, what: late, seconds: {_WORK}, at: {at}}}"]
    if case.kind == "slow_evaluation":  # two batches of each process
        words += [f"task={{_target_: trouble.SlowTask, num_classes: 4, {slow}, calls: 2}}"]
        words += [f"eval.every={case.step}"]
    if case.kind == "slow_save":
        words += [f"hooks.late={{_target_: trouble.LateSave, {slow}}}", "checkpoint.async=false"]
        words += [f"checkpoint.every.steps={case.step}"]
    program = Program(folder, tuple(words))
    try:
        seen = program.end(90)
    finally:
        program.kill()
    require(seen.code == 0, f"exit code {seen.code}", seen)
    require(seen.json("summary.json").get("status") == "completed", "summary.json", seen)
    require(not (seen.run / "logs" / "stacks.txt").exists(), "stacks", seen)
    require(seen.json("summary.json")["train_seconds"] > 2 * _WORK, "nothing was slow", seen)


def _hangs(case: Case, folder: Path) -> None:
    words = [*WORDS, f"launch.nproc_per_node={case.nproc}", f"launch.timeout={TIMEOUT}", "train.steps=60"]
    if case.kind == "worker":
        at = sample_of(case.step, case.rank, case.nproc)
        words += [f"data.train={{_target_: trouble.Data, what: sleep, at: {at}}}", "data.num_workers=1"]
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
    if case.nproc > 1:
        require(f": rank {case.rank} on " in seen.last, "the process that lags", seen)
    phase = f"{'waiting for data' if case.kind == 'worker' else 'in the training step'} (step {case.step})"
    told = [f"(launch.timeout): {phase}, in "]
    if case.kind == "stop":
        told = [f"(launch.timeout): stopped (SIGSTOP) {phase}"]
    if case.kind == "collective":  # the other is in the exchange of the step after
        told = ["all processes wait for each other in calls that differ: "]
        # In all_gather_object or the all_gather within, as far as they could exchange anything.
        told += [f"rank {case.rank} {phase} in all_gather", ", in make (trouble.py:"]
        told += [f"rank {1 - case.rank} in the training step (step {case.step + 1}) in "]
    for words in told:
        require(words in seen.last, f"{words!r} in the last line", seen)
    require("hang" in seen.json("summary.json").get("error", ""), "summary.json", seen)
