"""G11: a signal to the parent or any process, at any moment: a checkpoint, the right exit code, in time, no rest.

Afterwards every checkpoint is whole, and the same command comes to what the run has that got no signal (G1).
"""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from guarantees.kills import Outcome, Violated, compare
from guarantees.supervised import WORDS, Program, Seen, held, require, slack, whole_checkpoints

#: `dealt`: the first process waits for the data of all. `second…`: a second signal, where the end is far away.
MOMENTS = ("step", "start", "data", "evaluation", "save", "second", "dealt", "second_save")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
TARGETS = ("parent", "rank0", "rank1")
#: Seconds of a step and of a save of this small model. In the moment "save" one is under way, and either is slow.
_STEP, _SAVE = 0.1, 0.2
_SLOW_SAVES = 2 * 0.3
#: Seconds beside them, and those in which a second signal ends it all.
_MORE, _AT_ONCE = 2.0, 2.0
#: Seconds after which a second signal is not the first one, sent to all.
_LATER = 0.8


@dataclass(frozen=True)
class Case:
    number: int
    moment: str
    target: str
    nproc: int
    delay: float
    #: Who gets the second signal.
    then: str = "parent"
    #: Whether the command is given again, and its outcome compared.
    again: bool = True

    def __str__(self) -> str:
        then = f"-then-{self.then}" if self.moment.startswith("second") else ""
        return f"{signal.Signals(self.number).name}-{self.moment}-{self.target}{then}-of-{self.nproc}"


def cases(count: int, seed: int) -> list[Case]:
    draw = random.Random(seed)
    found = []
    for number in range(count):
        turn = number // len(MOMENTS)
        nproc = 1 if number % 5 == 3 else 2
        target, then = ("parent", "parent") if nproc == 1 else (TARGETS[number % 3], TARGETS[(number + turn) % 3])
        moment = MOMENTS[number % len(MOMENTS)]
        found.append(Case(SIGNALS[(number + turn) % 4], moment, target, nproc, draw.random() * 0.3, then))
    return found


def run(case: Case, folder: Path) -> str | None:
    return held(lambda: _run(case, folder))


def _run(case: Case, folder: Path) -> None:
    words = _words(case)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "moment").write_text(case.moment)
    program = Program(folder, words)
    second = case.moment.startswith("second")
    try:
        _await(case, program)
        program.send(case.number, case.target)
        if second:
            time.sleep(_LATER)
            require(program.process.poll() is None, "ended while a step or save was under way")
            program.send(case.number, case.then)
        seen = program.end(60)
    finally:
        program.kill()
    orderly, at_once = (130, 130) if case.number == signal.SIGINT else (75, 143)
    code = at_once if second else orderly
    require(seen.code == code, f"exit code {seen.code}, not {code}", seen)
    require("Traceback" not in seen.err, "a traceback", seen)
    saves = _SAVE + (_SLOW_SAVES if case.moment == "save" else 0.0)
    seconds = _AT_ONCE if second else _STEP + saves + _MORE
    require(seen.seconds < seconds * slack(), f"took {seen.seconds:.1f} s", seen)
    saved = whole_checkpoints(seen.run)
    if not second and case.moment != "start":
        _ended_in_order(seen, saved)
    if case.again:
        _goes_on(words, folder)


def _words(case: Case) -> tuple[str, ...]:
    words = (*WORDS, f"launch.nproc_per_node={case.nproc}", "hooks.slow={_target_: trouble.Moments}", "train.steps=30")
    words += ("checkpoint.every.steps=4",)
    if case.moment in ("data", "dealt"):
        words += ("data.train={_target_: trouble.Data, what: moment}", "data.num_workers=1", "data.eval=null")
        return (*words, "data.reader=main") if case.moment == "dealt" else words
    return (*words, "task._target_=trouble.SlowTask", "eval.every=6", "data.eval.samples=256")


def _await(case: Case, program: Program) -> None:
    """Until the moment of a case has come."""
    if case.moment == "start":
        time.sleep(0.2 + 8 * case.delay)
        if case.target != "parent":
            program.wait_for(lambda: len(program.ranks()) == 2)
        return
    if case.moment in ("data", "dealt"):
        # The worker sleeps over its sample: nothing is recorded any more.
        program.wait_for(lambda: program.records() > 0 and _stands_still(program))
        return
    if case.moment == "evaluation":
        status = program.run / "status.json"
        program.wait_for(lambda: status.exists() and '"evaluating"' in status.read_text())
    elif case.moment == "save":
        program.wait_for(lambda: list((program.run / "checkpoints").glob(".tmp-*")))
    elif case.moment == "step":
        program.wait_for(lambda: program.records() > 2)
    else:
        program.wait_for(lambda: (program.folder / "began").exists())
    time.sleep(case.delay)


def _ended_in_order(seen: Seen, saved: list[int]) -> None:
    steps = seen.steps
    require(steps == list(range(1, len(steps) + 1)), f"records {steps}", seen)
    require(seen.json("summary.json").get("status") == "interrupted", "summary.json", seen)
    require(saved and saved[-1] == steps[-1], f"checkpoints {saved} at step {steps[-1]}", seen)


def _goes_on(words: tuple[str, ...], folder: Path) -> None:
    """The same command, and nothing goes slowly any more: what it comes to is what `_undisturbed` came to."""
    expected = _undisturbed(words, folder / "undisturbed")
    (folder / "moment").unlink()
    seen = Program(folder, words).end()
    require(seen.code == 0, f"exit code {seen.code} of the same command", seen)
    whole_checkpoints(seen.run)
    try:
        compare(expected, Outcome.of(seen.run))
    except Violated as error:
        require(False, f"the same command: {error}", seen)


def _undisturbed(words: tuple[str, ...], folder: Path) -> Outcome:
    """What a command comes to that gets no signal; it is given once, in the folder of the first case that asks."""
    found = _known.get(words)
    if found is None:
        seen = Program(folder, words).end()
        require(seen.code == 0, f"exit code {seen.code} undisturbed", seen)
        found = _known[words] = Outcome.of(seen.run)
    return found


_known: dict[tuple[str, ...], Outcome] = {}


def _stands_still(program: Program) -> bool:
    before = program.records()
    time.sleep(1.0)
    return program.records() == before
