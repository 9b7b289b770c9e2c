"""G13: after a failure all start again from the last commit; a step that fails three times is a crash loop."""

from __future__ import annotations

import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

from guarantees.supervised import WORDS, Program, held, require, slack, whole_checkpoints

KINDS = ("error", "exit_7", "kill", "crash")
TOLD = {
    "error": "ValueError: boom",
    "exit_7": "ended with exit code 7",
    "kill": "killed (SIGKILL)",
    "crash": "killed by SIGSEGV",
}
_STEPS, _EVERY = 14, 4
#: Seconds from a failure to the next record of a step.
_SECONDS = 10.0


@dataclass(frozen=True)
class Case:
    kind: str
    rank: int
    step: int
    nproc: int
    named: bool
    loops: bool = False
    #: Whether checkpoints are written in the background.
    late: bool = True

    def __str__(self) -> str:
        return f"{self.kind}-step{self.step}-rank{self.rank}-of-{self.nproc}{'-loops' if self.loops else ''}"


def cases(count: int, seed: int) -> list[Case]:
    """Ten of eleven come back, and one fails again and again."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        turn, place = divmod(number, 11)
        loops = place == 10
        each = turn if loops else number - turn  # counted among its like
        nproc = 1 if each % 4 == 3 else 2
        kind = KINDS[(each + each // 4) % 4]
        rank = draw.randrange(nproc)
        found.append(Case(kind, rank, draw.randint(1, _STEPS - 1), nproc, each % 2 == 0, loops, each % 3 == 2))
    return found


def run(case: Case, folder: Path) -> str | None:
    return held(lambda: _run(case, folder))


def _run(case: Case, folder: Path) -> None:
    times = 1000 if case.loops else 1
    spec = f"what: {case.kind}, rank: {case.rank}, step: {case.step}, times: {times}"
    words = [word for word in WORDS if case.named or not word.startswith("run_dir=")]
    words += [f"launch.nproc_per_node={case.nproc}", "launch.max_restarts=5", f"train.steps={_STEPS}"]
    words += [f"hooks.bad={{_target_: trouble.Trouble, {spec}}}", f"checkpoint.every.steps={_EVERY}"]
    words += [f"checkpoint.async={str(case.late).lower()}", "hooks.slow={_target_: trouble.Slow, seconds: 0.05}"]
    program = Program(folder, tuple(words))
    try:
        committed, took = (0, 0.0) if case.loops else _comes_back(program)
        seen = program.end(90)
    finally:
        program.kill()
    runs = [folder / "r"] if case.named else [path for path in (folder / "runs").iterdir() if not path.is_symlink()]
    require(len(runs) == 1, f"{len(runs)} folders", seen)
    seen.run = runs[0]
    restarts = re.findall(r"^restart (\d) of 5: (.*)$", seen.err, re.MULTILINE)
    require(all(TOLD[case.kind] in why for _, why in restarts), f"causes {restarts}", seen)
    steps = seen.steps
    if case.loops:
        require(seen.code == 1, f"exit code {seen.code}", seen)
        require(len(restarts) == 2, f"{len(restarts)} restarts", seen)
        require(f"crash loop: step {case.step} failed 3 times" in seen.last, "the crash loop", seen)
        require(TOLD[case.kind] in seen.last, "its error", seen)
        return
    require(seen.code == 0, f"exit code {seen.code}", seen)
    require(len(restarts) == 1, f"{len(restarts)} restarts", seen)
    require(steps == list(range(1, _STEPS + 1)), f"records {steps}", seen)
    require(seen.json("summary.json").get("status") == "completed", "summary.json", seen)
    require(took < _SECONDS * slack(), f"the next record came {took:.1f} s after the failure", seen)
    # A failure comes before the checkpoint of its own step; the one before may be on its way in the background.
    last = (case.step - 1) // _EVERY * _EVERY
    require(committed == last or (case.late and committed == max(last - _EVERY, 0)), f"committed: {committed}", seen)
    told = re.findall(r"goes on  after step \d+,|begins   anew:", seen.out)
    require(told == [f"goes on  after step {committed}," if committed else "begins   anew:"], f"told {told}", seen)
    whole_checkpoints(seen.run)


def _comes_back(program: Program) -> tuple[int, float]:
    """The last committed step when the restart is told of, and the seconds from the failure to the next new record."""

    def found(name: str) -> list[Path]:
        return [*program.folder.glob(f"r/{name}"), *program.folder.glob(f"runs/[0-9]*/{name}")]

    def lines(name: str) -> set[str]:
        return {line for path in found(name) for line in path.read_text().splitlines()}

    # When this is told, nothing of the first attempt lives any more.
    program.wait_for(lambda: any("restart 1 of 5: " in line for line in lines("logs/main.log")))
    committed = max((int(path.name[5:]) for path in found("checkpoints/step_*")), default=0)
    before = lines("metrics.jsonl")
    program.wait_for(lambda: lines("metrics.jsonl") - before)
    return committed, time.time() - (program.folder / "began").stat().st_mtime
