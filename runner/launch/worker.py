"""One process of a run: takes a finished plan, never composes one.

`python -m runner.launch.worker MODULE:FUNCTION PLAN.json` calls the function with the plan and this process's place
among the others (torchrun's words in the environment), and exits with its code; the entry point is handed in, so that
this room knows nothing of what is run. `--listen FD` is a listening socket for the store of rank 0, `--parent PID` the
process with which this one ends.
"""

from __future__ import annotations

import argparse
import ctypes
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

from runner.distributed import Ranks
from runner.errors import Elsewhere, InputError, RunnerError
from runner.launch.environment import Environment
from runner.launch.failure import Failure, capture, captured, record, show
from runner.signals import INTERRUPTED, PREEMPTED, SIGNALS, exit_code


@dataclass
class WorkPlan:
    """All that a process needs to know: plain values that travel as JSON.

    `config` is complete and resolved; `written` is the same with interpolations as they were written; `marks` says
    where each key stands; `started` is the time (seconds since 1970) at which the program was started; `report` is
    the folder in which a process that fails leaves a record, for a parent that tells the user.
    """

    config: dict[str, Any]
    written: dict[str, Any]
    command: list[str]
    directory: str
    started: float
    marks: dict[str, list[Any]] = field(default_factory=dict)
    run_dir: str | None = None
    terminal: str | None = None
    full_error: bool = False
    json: bool = False
    report: str | None = None

    def save(self, path: Path) -> None:
        path.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        return json_module.dumps(asdict(self))

    @classmethod
    def load(cls, path: Path) -> WorkPlan:
        return cls.parse(path.read_text(encoding="utf-8"))

    @classmethod
    def parse(cls, text: str) -> WorkPlan:
        return cls(**json_module.loads(text))


Work = Callable[[WorkPlan, Ranks], int]

#: In the folder for reports: a signal that came before a process could hear it.
SIGNAL = "signal"


def entry(name: str) -> Work:
    """The function behind MODULE:FUNCTION."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def command(work: str, plan: Path, *, listen: int | None = None) -> list[str]:
    """The command line of a worker whose parent is this process, without the interpreter."""
    descriptor = [] if listen is None else ["--listen", str(listen)]
    return ["-m", "runner.launch.worker", work, str(plan), "--parent", str(os.getpid()), *descriptor]


def main(arguments: list[str]) -> NoReturn:
    """Runs the entry point and ends this process with its exit code."""
    parser = argparse.ArgumentParser(prog="runner.launch.worker")
    parser.add_argument("work")
    parser.add_argument("plan", type=Path)
    parser.add_argument("--listen", type=int)
    parser.add_argument("--parent", type=int)
    options = parser.parse_args(arguments)
    if options.parent is not None:
        end_with(options.parent)
    plan = WorkPlan.load(options.plan)
    environment = Environment.read()
    if environment.problems:
        show(Failure.of(InputError(*environment.problems), Ranks(), InputError.exit_code, None, None), plan)
        leave(InputError.exit_code)
    ranks = replace(environment.ranks or Ranks(), listen_fd=options.listen)
    _prepare(plan, ranks)
    code = _run(options.work, plan, ranks)
    if plan.report is not None and ranks.keep_store and code in (PREEMPTED, INTERRUPTED):
        # Torch's agent takes every other code than 0 for a failure and ends the others, which are saving as well.
        Path(plan.report, f"rank_{ranks.rank}.code").write_text(str(code), encoding="utf-8")
        code = 0
    leave(code)


def _prepare(plan: WorkPlan, ranks: Ranks) -> None:
    """Output and signals of a process that has a parent."""
    if plan.report is not None:
        Path(plan.report, f"rank_{ranks.rank}.pid").write_text(str(os.getpid()), encoding="utf-8")
        if not ranks.main:
            # Opened again, although the parent may have done so: torch's agent knows nothing of it.
            output = capture(Path(plan.report, f"rank_{ranks.rank}.out"))
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                os.dup2(output, stream.fileno())
                stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
            os.close(output)
    faulthandler.enable()
    leave_on_signals(speaks=ranks.main)
    # The parent starts its children with these blocked, so that none is hit before it can answer.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if plan.report is not None and (missed := Path(plan.report, SIGNAL)).exists():
        os.kill(os.getpid(), int(missed.read_text()))


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
            os.write(2, b"\ninterrupted before the first step: nothing to save\n")
        os._exit(exit_code(number))

    try:
        return {number: signal.signal(number, leave_at_once) for number in SIGNALS}
    except ValueError:
        return {}  # not the main thread


def end_with(parent: int) -> None:
    """Asks the system to kill this process when its parent dies, where it can, and makes sure that it still lives."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
