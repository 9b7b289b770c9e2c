"""G23: ten seconds after any kill no process is left, and no file outside of the run's folder.

Files are looked for in the folder where the program was started, in temporary, home and cache folders of its own, and
in shared memory.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from guarantees.kills import ENDED, Home, Start, Violated, gone, home_in
from guarantees.supervised import parent

MOMENTS = ("early", "start", "steps", "worker")
TARGETS = ("parent", "rank", "all")
#: Whom a kill hits where ranks have data workers.
WITH_WORKERS = ("worker", "rank", "all", "parent")
WORKERS, RANKS = 2, 2


@dataclass(frozen=True)
class Case:
    moment: str
    target: str
    delay: float

    def __str__(self) -> str:
        return f"{self.target}-{self.moment}"


def cases(count: int, seed: int) -> list[Case]:
    draw = random.Random(seed)
    found = []
    for number in range(count):
        moment = MOMENTS[number % 4]
        targets = WITH_WORKERS if moment == "worker" else TARGETS
        found.append(Case(moment, targets[(number + number // 4) % len(targets)], draw.random()))
    return found


def run(case: Case, folder: Path) -> str | None:
    workers = WORKERS if case.moment == "worker" else 0
    start = Start.of("ddp-fp32", "train.steps=400", f"data.num_workers={workers}")
    try:
        with home_in(folder / "home") as home:
            _killed(case, home, home.begin(start))
    except Violated as error:
        return f"{case}: {error}"
    return None


def _killed(case: Case, home: Home, process: subprocess.Popen[bytes]) -> None:
    if case.moment == "early":
        time.sleep(case.delay)
    elif case.moment == "start":
        _wait(home, process, lambda: len(home.ranks(home.living())) == RANKS)
        time.sleep(3 * case.delay)
    else:
        _wait(home, process, lambda: _records(home.run) > 1)
    if case.moment == "worker":
        _wait(home, process, lambda: len(_data_workers(home)) >= RANKS * WORKERS)
    living = home.living()
    home.seen.update(living)
    ranks = home.ranks(living)
    victims = {
        "parent": [process.pid],
        "rank": [ranks[max(ranks, default=0)]] if ranks else [process.pid],
        "all": [*ranks.values(), process.pid],
        "worker": _data_workers(home)[-1:],
    }[case.target]
    if process.poll() is not None or not victims:
        raise Violated(f"ended before the kill\n{home.said()}")
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    gone(home, process, str(case))
    if process.returncode == 0:
        raise Violated(f"the kill of {case} did nothing\n{home.said()}")


def _data_workers(home: Home) -> list[int]:
    living = home.living()
    ranks = set(home.ranks(living).values())
    return [pid for pid in sorted(living) if parent(pid) in ranks]


def _records(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _wait(home: Home, process: subprocess.Popen[bytes], holds: Callable[[], bool]) -> None:
    until = time.monotonic() + ENDED
    while not holds():
        if process.poll() is not None or time.monotonic() > until:
            raise Violated(f"what was waited for did not happen\n{home.said()}")
        time.sleep(0.01)
