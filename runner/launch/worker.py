"""One process of a run: takes a finished plan, never composes one.

`python -m runner.launch.worker MODULE:FUNCTION PLAN.json` calls the function with the plan and this process's place
among the others (torchrun's words in the environment), and exits with its code; the entry point is handed in, so that
this room knows nothing of what is run. `--listen FD` is a listening socket for the store of rank 0, `--parent PID` the
process with which this one ends, `--tell FD` a pipe by which that hears at once of a signal to this one, `--attempt N`
how often the processes have been started before.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json as json_module  # a plan has a field of that name
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from runner import garbage
from runner.distributed import Ranks
from runner.errors import Elsewhere, InputError, RunnerError
from runner.launch.environment import Environment
from runner.launch.failure import Failure, capture, captured, record, show
from runner.launch.report import OUTPUT, SIGNAL, STACKS, Report, file_of
from runner.launch.watch import answer
from runner.signals import (
    INTERRUPTED,
    NOTHING_TO_SAVE,
    PREEMPTED,
    SIGNALS,
    end_with,
    exit_code,
    fresh_in_forks,
    heard,
    speak_up,
    tell_by,
)


@dataclass
class WorkPlan:
    """All that a process needs to know: plain values that travel as JSON.

    `config` is complete and resolved; `written` is the same with interpolations as they were written; `marks` says
    where each key stands; `bound` are the targets that a recipe from elsewhere chose (key -> name); `started` is the
    time (seconds since 1970) at which the program was started; `report` is where a process that fails leaves a record,
    for a parent that tells the user (see launch.report); `watched` says that this parent looks at the signs of life as
    well; `again` is the run's folder after an earlier attempt.
    """

    config: dict[str, Any]
    written: dict[str, Any]
    command: list[str]
    directory: str
    started: float
    marks: dict[str, list[Any]] = field(default_factory=dict)
    bound: dict[str, str] = field(default_factory=dict)
    run_dir: str | None = None
    terminal: str | None = None
    full_error: bool = False
    json: bool = False
    report: str | None = None
    watched: bool = False
    again: str | None = None

    def save(self, path: Path) -> None:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(self.text())  # secrets are in it

    def text(self) -> str:
        return json_module.dumps(asdict(self))

    @classmethod
    def load(cls, path: Path) -> WorkPlan:
        return cls.parse(path.read_text(encoding="utf-8"))

    @classmethod
    def parse(cls, text: str) -> WorkPlan:
        return cls(**json_module.loads(text))


Work = Callable[[WorkPlan, Ranks], int]


def entry(name: str) -> Work:
    """The function behind MODULE:FUNCTION."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def command(work: str, plan: Path, **options: int | None) -> list[str]:
    """The command line of a worker whose parent is this process, without the interpreter."""
    given = {"parent": os.getpid(), **options}
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    return ["-m", "runner.launch.worker", work, str(plan), *words]


def main(arguments: list[str]) -> NoReturn:
    """Runs the entry point and ends this process with its exit code."""
    garbage.seldom()
    parser = argparse.ArgumentParser(prog="runner.launch.worker")
    parser.add_argument("work")
    parser.add_argument("plan", type=Path)
    parser.add_argument("--listen", type=int)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--tell", type=int)
    parser.add_argument("--attempt", type=int)
    options = parser.parse_args(arguments)
    if options.parent is not None:
        end_with(options.parent)
    if options.tell is not None:
        tell_by(options.tell)
    plan = WorkPlan.load(options.plan)
    environment = Environment.read()
    if environment.problems:
        show(Failure.of(InputError(*environment.problems), Ranks(), InputError.exit_code, None, None), plan)
        leave(InputError.exit_code)
    ranks = replace(environment.ranks or Ranks(), listen_fd=options.listen)
    if options.attempt is not None:
        ranks = replace(ranks, attempt=options.attempt)
    _prepare(plan, ranks)
    code = _run(options.work, plan, ranks)
    if plan.report is not None and ranks.keep_store and code in (PREEMPTED, INTERRUPTED, InputError.exit_code):
        # Torch's agent takes every other code than 0 for a failure: it ends the others, which are saving as well, and
        # starts again what the user has to mend.
        Path(plan.report, f"rank_{ranks.rank}.code").write_text(str(code), encoding="utf-8")
        code = 0
    leave(code)


def _prepare(plan: WorkPlan, ranks: Ranks) -> None:
    """Output and signals of a process that has a parent."""
    report = None if plan.report is None else Report(plan.report)
    if report is not None:
        report.clear(ranks.rank)
        if not plan.watched:
            report.path(f"rank_{ranks.rank}.pid").write_text(str(os.getpid()), encoding="utf-8")
        if not ranks.main:
            # Opened again, although the parent may have done so: torch's agent knows nothing of it.
            output = capture(report.path(file_of(ranks.rank, OUTPUT)))
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                os.dup2(output, stream.fileno())
                stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
            os.close(output)
        if plan.watched:
            answer(report.path(file_of(ranks.rank, STACKS)))
    faulthandler.enable()
    # After a restart there may be checkpoints: the parent says how to go on.
    leave_on_signals(speaks=ranks.main and plan.again is None)
    # The parent starts its children with these blocked, so that none is hit before it can answer.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if report is not None and (missed := report.read(SIGNAL)):
        os.kill(os.getpid(), int(missed))


def _run(work: str, plan: WorkPlan, ranks: Ranks) -> int:
    """The entry point's exit code; what it raises becomes a record, or is shown where nobody else does."""
    try:
        return entry(work)(plan, ranks)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except Elsewhere as error:
        return error.exit_code
    except BaseException as error:
        code = error.exit_code if isinstance(error, RunnerError) else 1
        record(plan, ranks, error, code)
        if plan.report is None:
            show(Failure.of(error, ranks, code, None, None), plan)
        elif not ranks.main and not captured():
            traceback.print_exc()  # into its log, where it has one
        return code


def leave(code: int) -> NoReturn:
    """Ends this process at once: at an orderly exit, what is left of a process group aborts it now and then."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def leave_on_signals(*, speaks: bool = True) -> dict[signal.Signals, Any]:
    """Until a training can end in order, a signal ends the process at once, with the exit code it would have then.

    Not by an exception: imports swallow those now and then. Returns the handlers that were there.
    """

    def leave_at_once(number: int, frame: Any) -> None:
        if speaks:
            speak_up(f"interrupted before the first step: {NOTHING_TO_SAVE}")
        os._exit(exit_code(number))

    fresh_in_forks()
    try:
        return {number: signal.signal(number, leave_at_once) for number in heard()}
    except ValueError:
        return {}  # not the main thread


if __name__ == "__main__":
    main(sys.argv[1:])
