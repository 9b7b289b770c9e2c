"""Random changes of one character of every recipe: a valid plan, or problems that can be shown, in little time.

What the checks without torch accept is built as far as it can be before a model is, which takes it or says what is
wrong; some are given to the program itself.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from guarantees.supervised import slack
from runner.errors import InputError
from runner.launch import processes
from runner.launch.environment import Environment
from runner.places import BUILTIN
from runner.recipe.compose import Composition, compose
from runner.recipe.problems import render

ROOT = Path(__file__).resolve().parent.parent.parent
#: Recipes whose data are files.
FILES = ("bert_sst2",)
RECIPES = sorted((BUILTIN / "recipes").glob("*.yaml"))
#: What may come into a file by a slip of the hand, an editor or a copy: YAML's own signs come more often.
SIGNS = ":-#{}[]&*!|>'\"%@`,?~$=<\t\n "
OTHERS = "".join(map(chr, range(32, 127))) + "\0\r\x1b\x85\ufeffé☃\u2028\U0001f600"

#: Seconds of the processor for one change, and for what torch has to be asked; seconds of the clock for a program.
MOST, BUILT, PROGRAM = 1.0, 5.0, 5.0
#: One of so many is given to the program; and one is built of those whose data are files, which take longer.
PROGRAMS, LARGE = 200, 10


@dataclass(frozen=True)
class Case:
    recipe: str
    change: str
    text: str
    #: The changed recipe comes from outside of the working directory.
    foreign: bool = False
    #: It is built where it is accepted; it is given to the program.
    builds: bool = False
    starts: bool = False


def cases(count: int, seed: int) -> list[Case]:
    """So many changes, in turn of each recipe."""
    rng = random.Random(seed)
    return [_case(RECIPES[number % len(RECIPES)], rng, number) for number in range(count)]


def _case(path: Path, rng: random.Random, number: int) -> Case:
    text = path.read_text(encoding="utf-8")
    at = rng.randrange(len(text) + 1)
    character = rng.choice(SIGNS if rng.random() < 0.5 else OTHERS)
    kind = rng.choice(("insert", "replace", "remove", "swap", "double"))
    changed = {
        "insert": text[:at] + character + text[at:],
        "replace": text[:at] + character + text[at + 1 :],
        "remove": text[:at] + text[at + 1 :],
        "swap": text[:at] + text[at + 1 : at + 2] + text[at : at + 1] + text[at + 2 :],
        "double": text[: at + 1] + text[at : at + 1] + text[at + 1 :],
    }[kind]
    foreign = rng.random() < 0.2
    builds = path.stem not in FILES or number // len(RECIPES) % LARGE == 0
    return Case(path.stem, f"{kind} {character!r} at {at}", changed, foreign, builds, number % PROGRAMS == 7)


def run(case: Case, folder: Path) -> str | None:
    """None where the change gave a plan or problems; else what was violated."""
    mine = folder / "mine"
    file = (folder / "elsewhere" / "sent.yaml") if case.foreign else (mine / "recipes" / f"{case.recipe}.yaml")
    for place in (mine, file.parent):
        place.mkdir(parents=True, exist_ok=True)
    file.write_bytes(case.text.encode("utf-8"))
    word = f"+recipe={file if case.foreign else case.recipe}"
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(20)
    started = time.process_time()
    try:
        composition = compose([word], directory=mine)
        environment = Environment()
        world = processes.processes(composition.config, environment)
        problems = [*composition.check(world), *processes.check(composition.config, environment)]
        seconds = time.process_time() - started
        shown = render(problems, composition.origins, directory=mine)
        wrong = _built(composition) if case.builds and not problems else None
        if wrong is None and case.starts:
            wrong = _program(word, mine, bool(problems))
    except Exception:
        return f"{case}: {traceback.format_exc()}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        file.unlink()
    if wrong is not None:
        return f"{case}: {wrong}"
    if seconds > MOST:
        return f"{case}: {seconds:.2f} s"
    if any(not problem.why or "\n" in str(InputError(problem)) for problem in problems):
        return f"{case}: {problems}"
    unplaced = [p for p in problems if p.mark is None and "missing" not in p.why and p.key not in composition.failed]
    if unplaced and not all(p.key in ("train", "data.train", "batch.global_size") for p in unplaced):
        return f"{case}: without a place: {unplaced}"
    return None if shown and "Traceback" not in shown else f"{case}: {shown}"


def _built(composition: Composition) -> str | None:
    """A valid plan, or problems, from the checks that build."""
    from runner import assemble

    started = time.process_time()
    try:
        parts = assemble.check(composition.config)
    except InputError as error:
        return None if error.problems and all(problem.why for problem in error.problems) else f"no problems: {error!r}"
    finally:
        seconds = time.process_time() - started
    if parts.task is None or parts.plan.steps < 1:
        return f"no plan: {parts}"
    return None if seconds < BUILT else f"built in {seconds:.2f} s"


def _program(word: str, directory: Path, wrong: bool) -> str | None:
    """What the program says: exit code 2 where it is wrong, and in time; else its configuration."""
    used, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    told = subprocess.run(
        [sys.executable, "-m", "runner", word, *([] if wrong else ["--cfg", "job"])],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    waited, then = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = then.ru_utime + then.ru_stime - used.ru_utime - used.ru_stime
    if told.returncode != (2 if wrong else 0) or "Traceback" in told.stderr + told.stdout:
        return f"exit code {told.returncode}: {told.stderr[-1500:]}"
    if wrong and " in the configuration" not in told.stderr:
        return f"it says {told.stderr[-1500:]}"
    if seconds > MOST or waited > PROGRAM * slack():
        return f"the program took {seconds:.2f} s of the processor, {waited:.1f} s"
    return None


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("20 s")
