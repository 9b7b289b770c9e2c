"""G18: of several that want a run's folder one gets it; the others hear who has it; a dead holder's lock is free."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from guarantees.supervised import WORDS, Program, held, require, slack

_HOLDER = """\
import os, sys, time
from pathlib import Path
from runner.errors import InputError
from runner.folder import RunFolder
folder, start, holds = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
time.sleep(max(0.0, start - time.time()))
try:
    mine = RunFolder.named(folder)
    mine.lock()
except InputError as error:
    print(error)
    sys.exit(2)
try:
    os.mkdir(folder / "inside")
except FileExistsError:
    print("two at once")
    os._exit(3)
time.sleep(holds)
os.rmdir(folder / "inside")
mine.unlock()
"""


@dataclass(frozen=True)
class Case:
    """`many` want the folder at one moment; before that, a holder was killed or has left, or there is none."""

    before: str
    many: int
    seed: int

    def __str__(self) -> str:
        return f"{self.many}-after-{self.before}-{self.seed}"


def cases(count: int, seed: int) -> list[Case]:
    draw = random.Random(seed)
    return [
        Case(("nobody", "killed", "leaves")[n % 3], draw.randint(2, 5), draw.randrange(10**6)) for n in range(count)
    ]


def run(case: Case, folder: Path) -> str | None:
    return held(lambda: _run(case, folder))


def _start(folder: Path, when: float, holds: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", _HOLDER, str(folder), str(when), str(holds)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _run(case: Case, folder: Path) -> None:
    draw, place = random.Random(case.seed), folder / "r"
    holder = None
    if case.before != "nobody":
        holder = _start(place, 0.0, 60.0 if case.before == "killed" else 1.6)
        until = time.monotonic() + 20
        while not (place / "inside").exists() and time.monotonic() < until:
            time.sleep(0.01)
    when = time.time() + 1.5
    racers = [_start(place, when + draw.random() * 0.002, 3.0) for _ in range(case.many)]
    if holder is not None and case.before == "killed":
        time.sleep(max(0.0, when - time.time() - draw.random() * 0.05))
        holder.kill()
        holder.wait()
        (place / "inside").rmdir()
    told = [(racer.communicate(timeout=30)[0], racer.returncode) for racer in racers]
    if holder is not None:
        holder.communicate(timeout=30)
    codes = sorted(code for _, code in told)
    require(codes == [0, *[2] * (case.many - 1)], f"codes {codes}: {told}")
    for words, code in told:
        if code == 2:
            require(re.search(r"\(host \S+, process \d+, since \d{4}-\d\d-\d\d [\d:]+\)", words), f"told {words}")


def second_start(folder: Path) -> str | None:
    """A second run in the folder of one that trains, and the same command after that was killed."""
    return held(lambda: _second_start(folder))


def _second_start(folder: Path) -> None:
    words = (*WORDS, "launch.nproc_per_node=2", "train.steps=60", "hooks.slow={_target_: trouble.Slow}")
    first = Program(folder, words)
    try:
        first.wait_for(lambda: first.records() > 1)
        second = Program(folder, words)
        seen = second.end(30)
        require(seen.code == 2, f"exit code {seen.code}", seen)
        require(re.search(r"another process trains there \(host \S+, process \d+, since ", seen.err), "who", seen)
        require(seen.seconds < 2 * slack(), f"took {seen.seconds:.1f} s", seen)
        first.send(signal.SIGKILL, "parent")
        first.process.wait()
        third = Program(folder, (*words[:-2], "train.steps=8"))
        seen = third.end(60)
        require(seen.code == 0, f"exit code {seen.code}", seen)
        require(seen.steps == list(range(1, len(seen.steps) + 1)), f"records {seen.steps}", seen)
    finally:
        first.kill()
