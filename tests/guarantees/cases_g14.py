"""G14: the first cause of a failure comes last on the screen: process, step, error; the others end soon."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

from guarantees.supervised import WORDS, Program, held, require, sample_of, slack

PLACES = ("model", "data", "hook", "save", "task", "system_exit", "exit_0", "kill")
_SECONDS = 5.0
#: The step in which everything goes wrong.
_STEP = 3


@dataclass(frozen=True)
class Case:
    place: str
    rank: int
    nproc: int

    def __str__(self) -> str:
        return f"{self.place}-rank{self.rank}-of-{self.nproc}"


def cases(count: int, seed: int) -> list[Case]:
    """Every place on rank 0 and 1 of 2 and 4, in an order that is drawn."""
    everything = [Case(place, rank, nproc) for place in PLACES for rank in (0, 1) for nproc in (2, 4)]
    random.Random(seed).shuffle(everything)
    return (everything * (count // len(everything) + 1))[:count]


#: Killed while all write a checkpoint: that the others cannot save then is no first cause.
WRITE = Case("write", 1, 2)

_WORDS = {
    "model": ("model={{_target_: trouble.Model, rank: {rank}}}", "ValueError: boom"),
    "task": ("task={{_target_: trouble.Task, num_classes: 4, rank: {rank}}}", "ValueError: boom"),
    "data": ("data.train={{_target_: trouble.Data, what: error, at: {at}}}", "ValueError: boom"),
    "hook": ("hooks.bad={{_target_: trouble.Trouble, what: error, rank: {rank}}}", "ValueError: boom"),
    "save": ("hooks.bad={{_target_: trouble.SlowSave, what: error, rank: {rank}}}", "ValueError: boom"),
    "system_exit": ("hooks.bad={{_target_: trouble.Trouble, what: system_exit, rank: {rank}}}", "SystemExit: enough"),
    "exit_0": ("hooks.bad={{_target_: trouble.Trouble, what: exit_0, rank: {rank}}}", "ended with exit code 0"),
    "write": ("hooks.bad={{_target_: trouble.LateSave, what: kill, rank: {rank}}}", "likely out of memory"),
    "kill": ("hooks.bad={{_target_: trouble.Trouble, what: kill, rank: {rank}}}", "likely out of memory"),
}
_KEYS = {"model": "model", "task": "task", "data": "data.train", "hook": "hooks.bad", "save": "hooks.bad"}


#: What is told of the step: what is raised ends a step that is not done yet, or comes after one.
_AFTER = {"model": _STEP - 1, "task": _STEP - 1, "data": _STEP - 1}


def run(case: Case, folder: Path) -> str | None:
    return held(lambda: _run(case, folder))


def _run(case: Case, folder: Path) -> None:
    word, told = _WORDS[case.place]
    word = word.format(rank=case.rank, at=sample_of(_STEP, case.rank, case.nproc))
    words = [*WORDS, f"launch.nproc_per_node={case.nproc}", "train.steps=40", word]
    program = Program(folder, (*words, f"checkpoint.every.steps={_STEP}", "checkpoint.async=false"))
    try:
        seen = program.end(90)
    finally:
        program.kill()
    took = time.time() - (folder / "began").stat().st_mtime
    require(seen.code == 1, f"exit code {seen.code}", seen)
    require(seen.last.startswith("error: smoke failed "), "the last line", seen)
    require(told in seen.last, f"{told!r} in the last line", seen)
    require(f": rank {case.rank} on " in seen.last, "the process", seen)
    if case.place in _KEYS:
        require(f"(in {_KEYS[case.place]})" in seen.last, "the key", seen)
    steps = [f"after step {_AFTER.get(case.place, _STEP)}"]
    if case.place in ("exit_0", "kill"):  # it says nothing itself: what the others say, or its last sign of life
        steps += [f"in the training step (step {_STEP})"]
    if case.place == "write":
        steps += [f"saving (step {_STEP})"]
    require(any(f"error: smoke failed {step}: " in seen.last for step in steps), f"{steps} in the last line", seen)
    require(told in seen.json("summary.json").get("error", ""), "summary.json", seen)
    require(seen.json("status.json").get("state") == "failed", "status.json", seen)
    require(took < _SECONDS * slack(), f"the others took {took:.1f} s", seen)
