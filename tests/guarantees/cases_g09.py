"""Random changes of one character of every recipe: a valid plan, or problems that can be shown, in little time."""

from __future__ import annotations

import random
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from runner.errors import InputError
from runner.launch import processes
from runner.launch.environment import Environment
from runner.places import BUILTIN
from runner.recipe.compose import compose
from runner.recipe.problems import render

RECIPES = sorted((BUILTIN / "recipes").glob("*.yaml"))
#: What may come into a file by a slip of the hand, an editor or a copy: YAML's own signs come more often.
SIGNS = ":-#{}[]&*!|>'\"%@`,?~$=<\t\n "
OTHERS = "".join(map(chr, range(32, 127))) + "\0\r\x1b\x85\ufeffé☃\u2028\U0001f600"

#: Seconds for one change.
MOST = 1.0


@dataclass(frozen=True)
class Case:
    recipe: str
    change: str
    text: str
    #: The changed recipe comes from outside of the working directory.
    foreign: bool = False


def cases(count: int, seed: int) -> list[Case]:
    """So many changes, in turn of each recipe."""
    rng = random.Random(seed)
    return [_case(RECIPES[number % len(RECIPES)], rng) for number in range(count)]


def _case(path: Path, rng: random.Random) -> Case:
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
    return Case(path.stem, f"{kind} {character!r} at {at}", changed, rng.random() < 0.2)


def run(case: Case, folder: Path) -> str | None:
    """None where the change gave a plan or problems; else what was violated."""
    mine = folder / "mine"
    file = (folder / "elsewhere" / "sent.yaml") if case.foreign else (mine / "recipes" / f"{case.recipe}.yaml")
    for place in (mine, file.parent):
        place.mkdir(parents=True, exist_ok=True)
    file.write_bytes(case.text.encode("utf-8"))
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(20)
    started = time.process_time()
    try:
        composition = compose([f"+recipe={file if case.foreign else case.recipe}"], directory=mine)
        environment = Environment()
        world = processes.processes(composition.config, environment)
        problems = [*composition.check(world), *processes.check(composition.config, environment)]
        seconds = time.process_time() - started
        shown = render(problems, composition.origins, directory=mine)
    except Exception:
        return f"{case}: {traceback.format_exc()}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        file.unlink()
    if seconds > MOST:
        return f"{case}: {seconds:.2f} s"
    if any(not problem.why or "\n" in str(InputError(problem)) for problem in problems):
        return f"{case}: {problems}"
    unplaced = [p for p in problems if p.mark is None and "missing" not in p.why and p.key not in composition.failed]
    if unplaced and not all(p.key in ("train", "data.train", "batch.global_size") for p in unplaced):
        return f"{case}: without a place: {unplaced}"
    return None if shown and "Traceback" not in shown else f"{case}: {shown}"


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("20 s")
