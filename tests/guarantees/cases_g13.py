"""G13: after a failure all start again from the last commit; a step that fails three times is a crash loop."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

from guarantees.supervised import WORDS, Program, held, require

KINDS = ("error", "exit_7", "kill", "crash")
TOLD = {
    "error": "ValueError: boom",
    "exit_7": "ended with exit code 7",
    "kill": "killed (SIGKILL)",
    "crash": "killed by SIGSEGV",
}
_STEPS, _EVERY = 14, 4


@dataclass(frozen=True)
class Case:
    kind: str
    rank: int
    step: int
    nproc: int
    named: bool
    loops: bool = False

    def __str__(self) -> str:
        return f"{self.kind}-step{self.step}-rank{self.rank}-of-{self.nproc}{'-loops' if self.loops else ''}"


def cases(count: int, seed: int) -> list[Case]:
    draw = random.Random(seed)
    found = []
    for number in range(count):
        nproc = 1 if number % 4 == 3 else 2
        kind = KINDS[(number + number // 4) % 4]
        rank = draw.randrange(nproc)
        found.append(Case(kind, rank, draw.randint(1, _STEPS - 1), nproc, number % 2 == 0, number % 10 == 5))
    return found


def run(case: Case, folder: Path) -> str | None:
    return held(lambda: _run(case, folder))


def _run(case: Case, folder: Path) -> None:
    times = 1000 if case.loops else 1
    spec = f"what: {case.kind}, rank: {case.rank}, step: {case.step}, times: {times}"
    words = [word for word in WORDS if case.named or not word.startswith("run_dir=")]
    words += [f"launch.nproc_per_node={case.nproc}", "launch.max_restarts=5", f"train.steps={_STEPS}"]
    words += [f"hooks.bad={{_target_: trouble.Trouble, {spec}}}", f"checkpoint.every.steps={_EVERY}"]
    program = Program(folder, tuple(words))
    try:
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
        require(re.search(r"crash loop: step \d+ failed 3 times", seen.last), "the crash loop", seen)
        require(TOLD[case.kind] in seen.last, "its error", seen)
        return
    require(seen.code == 0, f"exit code {seen.code}", seen)
    require(len(restarts) == 1, f"{len(restarts)} restarts", seen)
    require(steps == list(range(1, _STEPS + 1)), f"records {steps}", seen)
    require(seen.json("summary.json").get("status") == "completed", "summary.json", seen)
    kept = case.step - 1 if case.kind in ("kill", "crash", "exit_7") else case.step
    if kept >= 2 * _EVERY:
        require(f"after step {kept // _EVERY * _EVERY}," in seen.out or "goes on" in seen.out, "from the commit", seen)
