"""G18: of several that want a run's folder one gets it; the others hear who has it; a dead holder's lock is free."""

from __future__ import annotations

import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from programs import living

from guarantees.supervised import WORDS, Broken, Program, held, require, slack

#: Says when it is ready, wants a folder at the time that it is told, tells what it got and when (by the clock of all
#: processes), and holds it until its stdin ends.
_HOLDER = """\
import json, os, sys, time
from pathlib import Path
from runner.errors import InputError
from runner.folder import RunFolder
folder = Path(sys.argv[1])
print(json.dumps({"ready": True}), flush=True)
time.sleep(max(0.0, float(sys.stdin.readline()) - time.monotonic()))
asked, why = time.monotonic(), None
try:
    mine = RunFolder.named(folder)
    mine.lock()
except InputError as error:
    why = str(error)
print(json.dumps({"pid": os.getpid(), "asked": asked, "told": time.monotonic(), "why": why}), flush=True)
if why is not None:
    sys.exit(2)
try:
    os.mkdir(folder / "inside")
except FileExistsError:
    print("two at once")
    os._exit(3)
sys.stdin.read()
os.rmdir(folder / "inside")
mine.unlock()
"""
#: How a lock's holder is named.
_WHO = r"another process trains there \(host (\S+), process (\d+), since \d{4}-\d\d-\d\d [\d:]+\)"
#: Seconds within which a start in a folder that another one holds has ended.
LIMIT = 2.0


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


@dataclass
class _Holder:
    """A process that wants the folder when it is told to, and holds it until it is let go."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, folder: Path) -> _Holder:
        words = [sys.executable, "-c", _HOLDER, str(folder)]
        pipe = subprocess.PIPE
        return cls(subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True))

    def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        if not text.startswith("{"):
            raise Broken(f"told {text}{self.process.stdout.read()}")
        found: dict[str, Any] = json.loads(text)
        return found

    def want(self, when: float) -> None:
        """To be called once it has said that it is ready."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{when}\n")
        self.process.stdin.flush()

    def let_go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def end(self) -> tuple[int, str]:
        """The exit code, and what it said after all that it had to say."""
        assert self.process.stdout is not None
        said = self.process.stdout.read()
        return self.process.wait(30), said

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def _run(case: Case, folder: Path) -> None:
    started: list[_Holder] = []
    try:
        _race(case, folder / "r", started)
    finally:
        for one in started:
            one.kill()


def _race(case: Case, place: Path, started: list[_Holder]) -> None:
    draw = random.Random(case.seed)
    holder = None
    if case.before != "nobody":
        holder = _Holder.start(place)
        started.append(holder)
        holder.line()
        holder.want(0.0)
        require(holder.line()["why"] is None, "the holder did not get an empty folder")
    racers = [_Holder.start(place) for _ in range(case.many)]
    started += racers
    for racer in racers:
        racer.line()
    when = time.monotonic() + 0.1
    for racer in racers:
        racer.want(when + draw.random() * 0.002)
    if holder is not None:
        # Before that moment, or while they wait.
        time.sleep(max(0.0, when - time.monotonic() + draw.uniform(-0.05, 0.1)))
        if case.before == "killed":
            (place / "inside").rmdir()  # which it cannot do itself, and whoever comes next must not find
            holder.kill()
        else:
            holder.let_go()
            require(holder.end() == (0, ""), "the one before did not leave in order")
    told = [racer.line() for racer in racers]
    winners = [one for one in told if one["why"] is None]
    require(len(winners) == 1, f"{len(winners)} got it: {told}")
    (winner,) = winners
    for racer, one in zip(racers, told, strict=True):
        if one is not winner:
            code, said = racer.end()
            require((code, said) == (2, ""), f"exit code {code}: {said}")
            who = re.search(_WHO, one["why"])
            require(who, f"told {one['why']}")
            host, pid = who.groups() if who else ("", "")
            require(host == socket.gethostname(), f"named host {host}")
            require(int(pid) == winner["pid"], f"named process {pid} instead of {winner['pid']}: {told}")
            # From when it wanted it and another one had it.
            took = one["told"] - max(one["asked"], winner["told"])
            require(took < LIMIT * slack(), f"told after {took:.2f} s: {told}")
    (last,) = [racer for racer, one in zip(racers, told, strict=True) if one is winner]
    last.let_go()
    require(last.end() == (0, ""), "the winner did not leave in order")
    require(not (place / ".lock").exists(), "the lock was left behind")


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
        # The parent and its processes are one start; a terminal's lines may break anywhere.
        who = re.search(_WHO, " ".join(seen.err.split()))
        require(who, "who", seen)
        require(who and int(who[2]) in living(first.process.pid), f"not one of {living(first.process.pid)}", seen)
        require(seen.seconds < LIMIT * slack(), f"took {seen.seconds:.1f} s", seen)
        first.send(signal.SIGKILL, "parent")
        first.process.wait()
        third = Program(folder, (*words[:-2], "train.steps=8"))
        seen = third.end(60)
        require(seen.code == 0, f"exit code {seen.code}", seen)
        require(seen.steps == list(range(1, len(seen.steps) + 1)), f"records {seen.steps}", seen)
    finally:
        first.kill()
