"""What a process leaves behind when it fails, for the parent that tells the user."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import stat
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from runner.console import say, scrub
from runner.distributed import Ranks
from runner.errors import Follows, InputError, Mark, Problem, RunnerError
from runner.launch.report import FAILURE, RUN, Report, file_of
from runner.recipe.problems import render

if TYPE_CHECKING:
    from torch.distributed import Store

    from runner.launch.worker import WorkPlan

#: How torch and its libraries say that another process has gone, or did not come in time.
_GONE = re.compile(
    r"connection (was )?(closed|reset|refused)|connectFullMesh|gloo/transport|broken pipe|recvValue|sendBytes|"
    r"recvVector|socket (has )?timed? ?out|wait timeout|timed out waiting|timeout after|timed out after|"
    r"remote process|ncclRemoteError|ncclSystemError|NCCL communicator was aborted|store may be|failed to recv",
    re.IGNORECASE,
)
#: How torch says that a data worker was killed, or is gone: in a thread it cannot know why.
_KILLED = "killed by signal: Killed"
_WORKER_GONE = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed by signal|exited unexpectedly)")
_EXIT_CODE = re.compile(r"exited unexpectedly with exit code (\d+)")
#: How torch tells here of an error that a data worker met: as a text, with the worker's traceback in it.
_CAUGHT = re.compile(r"Caught (\S+) in DataLoader worker process \d+\.\nOriginal ")
_TRACEBACK = "Traceback (most recent call last):"
_FRAME = re.compile(r'  File "(.+)", line (\d+), in (.+)')
#: So much of a text of several lines stands in its one line, where the first of them is not longer.
_LONG = 300
#: Where Python starts processes: elsewhere EAGAIN means that something that was read has not come yet.
_STARTS = ("_launch", "_execute_child", "_fork_exec", "_posix_spawn", "spawnv_passfds")
NO_MORE = (
    "the system allows no more processes or threads: raise `ulimit -u`, or ask for fewer data.num_workers, "
    "launch.threads or launch.nproc_per_node"
)
#: Seconds for the processes to tell each other why the input is refused.
_COMES = 2.0
#: A line of a log that is on the terminal as well.
_MESSAGE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ INFO ")
#: Stands before the name of the log to which a process has moved its output.
_MOVED = b"\0"


@dataclass(frozen=True)
class Failure:
    """Why a process failed. `secondary`: only because another one did; `told` and `go_on`: see `record`."""

    rank: int
    world_size: int
    host: str
    time: float
    code: int
    error: str
    traceback: str | None = None
    problems: list[dict[str, Any]] = field(default_factory=list)
    secondary: bool = False
    told: str | None = None
    go_on: str | None = None
    folder: str | None = None

    @classmethod
    def of(
        cls,
        error: BaseException,
        ranks: Ranks,
        code: int,
        told: str | None = None,
        go_on: str | None = None,
        folder: Path | None = None,
        key: str | None = None,
    ) -> Failure:
        expected = isinstance(error, RunnerError)
        return cls(
            rank=ranks.rank,
            world_size=ranks.world_size,
            host=socket.gethostname(),
            time=time.time(),
            code=code,
            error=worded(error, key),
            traceback=None if expected else scrub("".join(traceback.format_exception(error))),
            problems=[_plain(problem) for problem in error.problems] if isinstance(error, InputError) else [],
            secondary=is_secondary(error),
            told=told,
            go_on=go_on,
            folder=None if folder is None else str(folder),
        )

    @property
    def said(self) -> str:
        """The error, with the process where there are several."""
        return f"rank {self.rank} on {self.host}: {self.error}" if self.world_size > 1 else self.error

    def save(self, report: Report) -> None:
        report.write(file_of(self.rank, FAILURE), json.dumps(asdict(self), default=str))


def record(
    plan: WorkPlan,
    ranks: Ranks,
    error: BaseException,
    code: int,
    *,
    told: str | None = None,
    go_on: str | None = None,
    folder: Path | None = None,
    key: str | None = None,
) -> None:
    """Leaves rank_N.json in the plan's report, where it has one. A process' first failure counts.

    `told` says what failed and when ("mlp failed after step 3"), `go_on` is the command that goes on, `folder` that of
    the run, `key` the part of the configuration that the error comes from.
    """
    failure = Failure.of(error, ranks, code, told, go_on, folder, key)
    # A full disk or a folder that has gone must not hide the failure itself.
    with suppress(OSError):
        _tell_torchrun(failure)
        if plan.report is not None and not (report := Report(plan.report)).read(file_of(ranks.rank, FAILURE)):
            failure.save(report)


def worded(error: BaseException, key: str | None = None) -> str:
    """An error in one line, with the key of the configuration that it comes from, where that is known."""
    raised = raised_by(error)
    if isinstance(error, RunnerError):
        return _joined(scrub(raised.text))
    text = _shortened(scrub(raised.text))
    place = "" if text else _own_place(raised.frames)
    text = f"{raised.kind}: {text}" if text else f"{raised.kind}{place}"
    if gone(error):
        text = _why_gone(text, error)
    elif _allows_no_more(error, raised):
        text = f"{text}: {NO_MORE}"
    return text if key is None else f"{text} (in {key})"


class Frame(NamedTuple):
    """A line of code that was being run."""

    file: str
    line: int
    function: str


@dataclass(frozen=True)
class Raised:
    """What was raised and where (outermost first); `afar`: by a data worker, of which torch gives a text only."""

    kind: str
    text: str
    frames: Sequence[Frame]
    afar: bool = False


def raised_by(error: BaseException) -> Raised:
    """An error as it was where it was raised, be that in a data worker."""
    text = str(error)
    passed = list(traceback.walk_tb(error.__traceback__))
    # Torch makes the same kind of error of the text, and where it cannot (a group's) fails in doing so.
    of_torch = passed[-1][0].f_locals.get("msg") if passed and passed[-1][0].f_code.co_name == "reraise" else None
    for told in (text, str(of_torch)):
        if caught := _CAUGHT.search(told):
            return _taken_apart(caught[1], told[caught.end() :])
    frames = [Frame(frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in passed]
    return Raised(type(error).__name__, text, frames)


def _taken_apart(kind: str, told: str) -> Raised:
    """An error from the text of its traceback: the last one of several, and not one that the error's own text holds."""
    lines = told.splitlines()
    first = re.compile(rf"(?:\S+\.)?{re.escape(kind)}(?:: (.*))?")
    for begin in (number for number in reversed(range(len(lines))) if lines[number].strip() == _TRACEBACK):
        end = begin + 1
        while end < len(lines) and (not lines[end] or lines[end][0].isspace()):
            end += 1
        if end < len(lines) and (found := first.fullmatch(lines[end])):
            frames = [Frame(at[1], int(at[2]), at[3]) for at in map(_FRAME.fullmatch, lines[begin:end]) if at]
            return Raised(kind, "\n".join([found[1] or "", *lines[end + 1 :]]), frames, afar=True)
    # It was never raised, or is one of several in a group, which Python draws with lines.
    bare = [line.strip(" |+-") for line in lines]
    named = [found[1] or "" for found in map(first.fullmatch, bare) if found]
    return Raised(kind, next(iter(named or filter(None, reversed(bare))), ""), [], afar=True)


def gone(error: BaseException) -> list[int]:
    """The data workers of whose end an error tells, by their numbers as processes."""
    found = _WORKER_GONE.search(str(error)) if isinstance(error, RuntimeError) else None
    return [] if found is None else [int(pid) for pid in found[1].split(",")]


def _why_gone(text: str, error: BaseException) -> str:
    told = f"{error} {error.__cause__}"  # that a worker is gone may be found while torch tells how it ended
    if code := _EXIT_CODE.search(told):
        return f"a data worker ended itself with exit code {code[1]}"
    if _KILLED not in told and "exited unexpectedly" not in told:
        return text
    how_sure = "likely" if _KILLED in told else "perhaps"
    return f"{text.rstrip('. ')}: {how_sure} out of memory, try a smaller data.num_workers"


def _allows_no_more(error: BaseException, raised: Raised) -> bool:
    """Whether an error says that no process or thread could be started."""
    if isinstance(error, OSError):
        started = bool(raised.frames) and raised.frames[-1].function in _STARTS
        return started and (error.errno == errno.EAGAIN or os.strerror(errno.EAGAIN) in raised.text)
    # Python's words for a thread, and all that is left of those of C++.
    return isinstance(error, RuntimeError) and raised.text.strip() in (
        "can't start new thread",
        os.strerror(errno.EAGAIN),
    )


def _own_place(frames: Sequence[Frame]) -> str:
    """The innermost line of the user's own code, for an error that says nothing else."""
    paths = sysconfig.get_paths()
    others = (*(paths[name] for name in ("stdlib", "platstdlib")), str(Path(__file__).resolve().parents[1]))
    for file, line, _ in reversed(frames):
        of_others = any(Path(file).is_relative_to(other) for other in others)
        if not of_others and not file.startswith("<") and not {"site-packages", "dist-packages"} & {*Path(file).parts}:
            with suppress(OSError, ValueError):  # the folder may be gone, or the file elsewhere
                file = str(Path(file).relative_to(Path.cwd()))
            return f" at {file}:{line}"
    return ""


def _joined(text: str) -> str:
    """A text of several lines in one."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _shortened(text: str) -> str:
    """A text in one line: a single one as it is, several up to where they are long."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or text.splitlines() == [text]:
        return text if lines else ""
    joined, most = " ".join(lines), max(_LONG, len(lines[0]))
    return joined if len(joined) <= most else f"{joined[:most].rstrip()} ..."


def tell_run(plan: WorkPlan, folder: Path, go_on: str) -> None:
    """Lets the parent know the run's folder and the command that goes on, for the day when no process can say so."""
    if plan.report is not None:
        with suppress(OSError, KeyError):
            Report(plan.report).write(RUN, json.dumps({"folder": str(folder.absolute()), "go_on": go_on}))


def told_run(report: Report) -> dict[str, str]:
    """What `tell_run` said last: folder, go_on; nothing before the run has a folder."""
    try:
        return dict(json.loads(report.read(RUN)))
    except ValueError:
        return {}


def share(plan: WorkPlan, ranks: Ranks, store: Store) -> None:
    """Lets the other nodes' parents know why this process failed; takes theirs where it failed only because of it."""
    if plan.report is None:
        return
    report = Report(plan.report)
    with suppress(Exception):  # the store's process may have ended as well
        mine = next(failure for failure in failures(report) if failure.rank == ranks.rank)
        refused = mine.code == InputError.exit_code  # then all processes are here, and soon
        until = time.monotonic() + (_COMES if refused else 0.0)
        if not mine.secondary:
            store.set("failure", json.dumps(asdict(mine), default=str))
        elif _comes(lambda: store.check(["failure"]), until):
            Failure(**json.loads(store.get("failure"))).save(report)
        if refused:
            store.add("heard", 1)  # the store may go with the first of them
            _comes(lambda: store.add("heard", 0) >= ranks.world_size, until)


def _comes(condition: Callable[[], bool], until: float) -> bool:
    while not (found := condition()) and time.monotonic() < until:
        time.sleep(0.02)
    return found


def failures(report: Report | Path) -> list[Failure]:
    """What processes have left in a report, in the order in which it happened."""
    report = report if isinstance(report, Report) else Report(report)
    found = []
    for name in report.matching("rank_*.json"):
        with suppress(ValueError, TypeError):
            found.append(Failure(**json.loads(report.read(name))))
    return sorted(found, key=lambda failure: failure.time)


def is_secondary(error: BaseException) -> bool:
    """Whether an error says only that another process has ended, or came of one that does."""
    if isinstance(error, Follows):
        return True
    if isinstance(error, RunnerError) and not isinstance(error, InputError):
        return error.__cause__ is not None and is_secondary(error.__cause__)
    if isinstance(error, InputError) or not isinstance(error, (RuntimeError, ValueError)):
        return False
    return _GONE.search(str(error)) is not None


def show(failure: Failure, plan: WorkPlan) -> None:
    """Tells the user of a failure on stderr; its one line comes last."""
    if failure.problems:
        origins = {key: Mark(*mark) for key, mark in plan.marks.items()}
        if plan.full_error and failure.traceback:
            say(failure.traceback, sys.stderr)
        problems = [_problem(values) for values in failure.problems]
        say(render(problems, origins, directory=Path(plan.directory)) + "\n", sys.stderr)
        return
    if failure.traceback:
        say(failure.traceback, sys.stderr)
    if failure.go_on:
        say(f"to go on: {failure.go_on}\n", sys.stderr if plan.json else sys.stdout)
    told = failure.told or f"{plan.config.get('name', 'the run')} failed"
    say(f"error: {told}: {failure.said}\n", sys.stderr)


def _plain(problem: Problem) -> dict[str, Any]:
    """A problem as JSON has it."""
    mark = problem.mark
    values: dict[str, Any] = {"key": problem.key, "why": problem.why, "fix": problem.fix}
    if mark is not None:
        values["mark"] = [mark.file, mark.line, mark.column]
    return {**values, "value": problem.value} if problem.has_value else values


def _problem(values: dict[str, Any]) -> Problem:
    mark = values.pop("mark", None)
    return Problem(**values, mark=None if mark is None else Mark(*mark))


def _tell_torchrun(failure: Failure) -> None:
    """Leaves the error where torch's agent looks for it, so that its own table names it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": failure.traceback or failure.error, "timestamp": str(int(failure.time))}
        message = {"message": failure.error, "extraInfo": extra, "errorCode": failure.code}
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


# --- the output of a process that does not speak on the terminal -----------------------------------------------------


def capture(path: Path) -> int:
    """Opens the file that takes a process' output until it has a log; `redirect` knows it by how it is open."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)


def redirect(path: Path) -> None:
    """Lets this process's stdout and stderr go to the end of its log, with what it has said so far.

    Does so only for a process of our own launch that does not speak on the terminal; under another launcher the
    output stays where that put it.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    if not captured():
        return
    said = os.pread(1, os.fstat(1).st_size, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.write(log, said)
    os.ftruncate(1, 0)
    os.write(1, _MOVED + os.fsencode(path.absolute()))
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def said(path: Path) -> tuple[str, bool]:
    """The last that a process has said, from the file that `capture` opened or from its log; whether it has a log."""
    try:
        content = path.read_bytes()
        moved = content.startswith(_MOVED)
        if moved:
            with Path(os.fsdecode(content[len(_MOVED) :])).open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
                content = log.read()
    except OSError:
        return "", False
    lines = [line for line in content.decode(errors="replace").rstrip().splitlines() if not _MESSAGE.match(line)]
    return "\n".join(lines[-20:] if moved else lines[-200:]), moved


def captured() -> bool:
    """Whether this process's output goes to the file that `capture` opened, and not to a log or terminal."""
    try:
        flags = fcntl.fcntl(1, fcntl.F_GETFL)
        plain = stat.S_ISREG(os.fstat(1).st_mode)
    except OSError:
        return False
    return plain and flags & os.O_ACCMODE == os.O_RDWR and bool(flags & os.O_APPEND)
