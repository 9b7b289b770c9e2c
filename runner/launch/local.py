"""The parent of one node's processes: starts them, hands on signals, finds hangs, starts again, tells of failures."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from runner.console import say
from runner.errors import RunnerError
from runner.folder import RunFolder
from runner.heartbeat import ENDING, Beat, last
from runner.launch import watch
from runner.launch.failure import NO_MORE, Failure, capture, failures, said, show, told_run
from runner.launch.report import BEAT, OUTPUT, PLAN, STACKS, Report, file_of, files_allowed, temporary
from runner.launch.watch import LOOK, View, Watch
from runner.launch.worker import WorkPlan, command
from runner.signals import INTERRUPTED, PREEMPTED, SAME, SIGNALS, TWICE, at_once, exit_code, heard

#: Seconds for the others once a process has failed, and once one has ended after a signal: they are saving as well, or
#: end at once where there is nothing to save yet. One that joins the group then hears of no signal, and waits on.
_GRACE, _GRACE_SAVING, _GRACE_STARTING = 3.0, 30.0, 1.0
_POLL = 0.02
#: A step that fails so often is not tried again.
_CRASHES = 3
#: Files that rank 0 keeps open beside two connections to each process, the group's and the store's. Where it may have
#: no more, it takes no connection, and the others wait for ever.
_FILES = 32
_MORE_FILES = "allow more, for example `ulimit -n 4096`"


def supervise(work: str, plan: WorkPlan, nproc: int) -> int:
    """Runs MODULE:FUNCTION in `nproc` processes of this computer; no process is left, whatever happens.

    Rank 0 keeps the terminal. After a failure all are started again, as often as launch.max_restarts says, and go on
    in the same folder; not after a signal or where the input is wrong, nor where one step fails again and again. The
    first cause of a failure is told last, and how to go on where no process could say it. Returns the exit code of the
    whole.
    """
    most = plan.config.get("launch", {}).get("max_restarts") or 0
    crashes: Counter[str] = Counter()
    told: dict[str, str] = {}
    with heard_signals() as heard:
        for attempt in range(most + 1):
            with _report(nproc) as report:
                node = Node(work, replace(plan, report=report.name, watched=True), nproc, report, heard, attempt)
                try:
                    node.start()
                    node.wait()
                finally:
                    node.end()
                told |= told_run(report)
                if heard.left is not None:
                    tell_interrupted(plan, told, heard.received)
                    return heard.left
                cause = node.cause()
                if isinstance(cause, int):
                    if cause in (PREEMPTED, INTERRUPTED) and node.lost_its_place(told.get("folder")):
                        if attempt:
                            say(f"interrupted after restart {attempt}\n", sys.stderr)
                        tell_interrupted(plan, told, heard.received or _signal_of(cause))
                    return cause
                if not cause.problems:
                    go_on, folder = cause.go_on or told.get("go_on"), cause.folder or told.get("folder")
                    cause = replace(cause, go_on=go_on, folder=folder)
                where = node.step_of(cause)
                crashes[where] += 1
                if crashes[where] == _CRASHES and not cause.problems:
                    why = f"crash loop: {where} failed {_CRASHES} times, at last with: {cause.error}"
                    return _show(replace(cause, error=why), node.plan, report)
                if attempt == most or cause.problems or heard.received is not None:
                    if attempt and not cause.problems:
                        cause = replace(cause, error=f"{cause.error} (after restart {attempt})")
                    return _show(cause, node.plan, report)
                again = told.get("folder")
                # What the processes wrote may be a consequence only, and the next ones may not live to write anything.
                _correct(cause, failures(report), again)
                _tell_restart(attempt + 1, most, cause, where, again)
                plan = replace(plan, again=again, started=time.time())
    raise AssertionError("the last attempt returns")


def _tell_restart(number: int, most: int, cause: Failure, where: str, folder: str | None) -> None:
    """One line about a restart: on the terminal, and in the run's log."""
    line = f"restart {number} of {most}: {where} failed: {cause.said}"
    say(f"{line}\n", sys.stderr)
    if folder is not None:
        with suppress(OSError), Path(folder, "logs", "main.log").open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} WARNING {line}\n")


@contextmanager
def _report(nproc: int) -> Iterator[Report]:
    """What the processes write to: in memory, or in a folder where the system has nothing of the kind."""
    report = Report.in_memory(nproc)
    if report is not None:
        try:
            yield report
        finally:
            report.close()
        return
    with temporary() as folder:
        yield Report(folder)


# --- signals --------------------------------------------------------------------------------------------------------


class Heard:
    """The signals that this process, or one of its children, has got.

    `received` is the first of them, `left` the exit code once a second one has ended it all; `forward` hands the first
    one on, `kill` ends all processes.
    """

    received: int | None = None
    left: int | None = None

    def __init__(self, forward: Callable[[int, int | None], None], kill: Callable[[], None]) -> None:
        self.forward, self.kill = forward, kill
        self._when = self._of_child = 0.0

    def __call__(self, number: int, frame: Any = None) -> None:
        if self.received is None:
            self.received, self._when = number, time.monotonic()
            self.forward(number, None)
        elif time.monotonic() - self._of_child > TWICE and not self._same(number):
            self._leave(number)

    def by_child(self, number: int, rank: int) -> None:
        """A child has got a signal itself: the others hear of it. A second one it may not hear, in a collective."""
        if self.received is None:
            self.received, self._when = number, time.monotonic()
            self._of_child = self._when
            self.forward(number, rank)
        elif time.monotonic() - self._when > TWICE:
            self._leave(number)

    def _same(self, number: int) -> bool:
        return number == self.received and time.monotonic() - self._when < SAME

    def _leave(self, number: int) -> None:
        self.left = at_once(number)
        self.kill()


@contextmanager
def heard_signals(
    forward: Callable[[int, int | None], None] = lambda number, rank: None, kill: Callable[[], None] = lambda: None
) -> Iterator[Heard]:
    """Hears the signals that end a run, where this is the main thread; else they belong to somebody else."""
    found = Heard(forward, kill)
    try:
        before = {number: signal.signal(number, found) for number in heard()}
    except ValueError:
        yield found
        return
    try:
        yield found
    finally:
        for number, old in before.items():
            signal.signal(number, old)


# --- processes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ending:
    """How a process ended: its code (negative: the signal), when, whether its parent ended it, its peak memory."""

    rank: int
    code: int
    time: float
    by_parent: bool = False
    peak: int | None = None


class Process:
    """One rank: a process in a group of its own, so that its data workers end with it.

    `ear` is the end of a pipe by which the system says at once that the process got a signal, whatever it is doing.
    """

    def __init__(self, rank: int, popen: subprocess.Popen[bytes], ear: int) -> None:
        self.rank = rank
        self.popen = popen
        self.ending: Ending | None = None
        self._ear = ear
        self._sent = 0
        self._killed = False

    def poll(self, *, wait: bool = False) -> Ending | None:
        if self.ending is None:
            try:
                pid, status, usage = os.wait4(self.popen.pid, 0 if wait else os.WNOHANG)
            except ChildProcessError:
                pid, status, usage = self.popen.pid, 0, None
            if pid:
                self.popen.returncode = os.waitstatus_to_exitcode(status)
                unit = 1 if sys.platform == "darwin" else 1024
                peak = None if usage is None else usage.ru_maxrss * unit
                self.ending = Ending(self.rank, self.popen.returncode, time.time(), self._killed, peak)
        return self.ending

    def heard(self) -> int | None:
        """The first of the signals that the process has got since the last call, and not from here."""
        try:
            found = [number for number in os.read(self._ear, 4096) if number in SIGNALS]
        except OSError:
            return None
        ours = min(self._sent, len(found))
        self._sent -= ours
        return found[ours] if ours < len(found) else None

    def send(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.popen.pid, number)
                self._sent += 1

    def kill(self) -> None:
        """Kills the process and what it has started."""
        self._killed = self._killed or self.poll() is None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)

    def close(self) -> None:
        with suppress(OSError):
            os.close(self._ear)


class Node:
    """The processes of one computer, from their start to their end: one attempt."""

    def __init__(self, work: str, plan: WorkPlan, nproc: int, report: Report, heard: Heard, attempt: int) -> None:
        self.work = work
        self.plan = plan
        self.nproc = nproc
        self.attempt = attempt
        self.processes: list[Process] = []
        self._report = report
        self._heard = heard
        self._hang: Failure | None = None
        reads = [partial(last, report.path(file_of(rank, BEAT))) for rank in range(nproc)]
        timeout = plan.config.get("launch", {}).get("timeout") or float("inf")
        self._watch = Watch(reads, timeout, compiles=bool(plan.config.get("compile")))
        heard.forward, heard.kill = self._forward, self._kill

    def start(self) -> None:
        """Starts all processes. The store's port is open before, and rank 0 inherits it: no other program can take it.

        Raises RunnerError where the system allows no more processes, or too few files.
        """
        files, allowed = _FILES + 2 * self.nproc, files_allowed()
        if self.nproc > 1 and files > allowed:
            why = f"the first keeps about {files} files and connections open, and the system allows {allowed:.0f}"
            raise RunnerError(f"{self.nproc} processes cannot be started: {why}: {_MORE_FILES}")
        try:
            self._report.write(PLAN, self.plan.text())
            with socket.create_server(("127.0.0.1", 0)) as listening:
                common = environment(self.plan, self.nproc, listening.getsockname()[1])
                for rank in range(self.nproc):
                    listen = listening.fileno() if rank == 0 and self.nproc > 1 else None
                    self._start(rank, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, listen)
        except OSError as error:
            which = f"process {len(self.processes) + 1} of {self.nproc}"
            fix = {errno.EMFILE: f": {_MORE_FILES}", errno.EAGAIN: f": {NO_MORE}"}.get(error.errno or 0, "")
            raise RunnerError(f"{which} cannot be started: {error}{fix}") from error

    def _start(self, rank: int, variables: dict[str, str], listen: int | None) -> None:
        with ExitStack() as opened:
            output = None if rank == 0 else capture(self._report.path(file_of(rank, OUTPUT)))
            if output is not None:
                opened.callback(os.close, output)
            ear, mouth = os.pipe()
            opened.callback(os.close, mouth)
            os.set_blocking(ear, False)
            os.set_blocking(mouth, False)
            options = {"listen": listen, "tell": mouth, "attempt": self.attempt}
            words = [sys.executable, *command(self.work, self._report.path(PLAN), **options)]
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                popen = subprocess.Popen(
                    words,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=[number for number in (listen, mouth) if number is not None],
                    process_group=0,
                )
                self.processes.append(Process(rank, popen, ear))
            except OSError:
                os.close(ear)
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if self._heard.received is not None:
            self.processes[-1].send(self._heard.received)

    def _forward(self, number: int, rank: int | None) -> None:
        """Hands a signal on to the processes that have not got it themselves."""
        for process in self.processes:
            if process.rank != rank and process.heard() is None:
                process.send(number)

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()

    def wait(self) -> None:
        """Until all have ended, or hang. When one fails, the others get a moment to fail, or to save, as well."""
        looked = 0.0
        while True:
            endings = [process.poll() for process in self.processes]
            if all(endings):
                return
            for process in self.processes:
                if (number := process.heard()) is not None:
                    self._heard.by_child(number, process.rank)
            bad = [ending for ending in endings if ending is not None and ending.code != 0]
            if self._heard.received is not None and any(ending.code == at_once(signal.SIGTERM) for ending in bad):
                self._heard.left = at_once(signal.SIGTERM)  # a second signal, to one of them
                return
            if bad:
                saving = all(ending.code in (PREEMPTED, INTERRUPTED) for ending in bad)
                grace = (_GRACE_SAVING if self._trains() else _GRACE_STARTING) if saving else _GRACE
                if time.time() > min(ending.time for ending in bad) + grace:
                    return
            elif time.monotonic() - looked >= LOOK:
                looked = time.monotonic()
                if self._watch.look():
                    self._hang = self._hangs()
                    return
            time.sleep(_POLL)

    def _trains(self) -> bool:
        """Whether any process has come to its training, and may have something to save."""
        return any(self._last(rank).beats for rank in range(self.nproc))

    def _hangs(self) -> Failure:
        """Collects the stacks of all and finds out who lags behind."""
        run = told_run(self._report)
        folder = Path(run["folder"]) if run else None
        pids = [process.popen.pid for process in self.processes]
        still = [watch.stopped(pid) for pid in pids]
        stacks = watch.ask(pids, [self._report.path(file_of(process.rank, STACKS)) for process in self.processes])
        views = [View(rank, self._watch.beats[rank], still[rank], stacks[rank]) for rank in range(self.nproc)]
        titles = [
            f"rank {view.rank}, process {pid}, {view.beat}{', stopped (SIGSTOP)' if view.stopped else ''}, "
            f"no progress for {self._watch.waited(view.rank):.1f} s"
            for view, pid in zip(views, pids, strict=True)
        ]
        path = watch.write_stacks(folder, list(zip(titles, stacks, strict=True)))
        rank, what = watch.blame(views)
        error = watch.told(self._watch.limit, what, path)
        return self._failure(rank, error, self._watch.beats[rank])

    def _failure(self, rank: int, error: str, beat: Beat | None = None) -> Failure:
        """A failure of which the process itself could say nothing."""
        run = told_run(self._report)
        beat = beat or self._last(rank)
        told = f"{self.plan.config.get('name', 'the run')} failed {beat}" if beat.beats else None
        go_on, folder = run.get("go_on"), run.get("folder")
        host = socket.gethostname()
        return Failure(rank, self.nproc, host, time.time(), 1, error, told=told, go_on=go_on, folder=folder)

    def _last(self, rank: int) -> Beat:
        return last(self._report.path(file_of(rank, BEAT)))

    def cause(self) -> Failure | int:
        """Why the processes failed, or the exit code where they did not."""
        if self._hang is not None:
            return self._hang
        endings = [process.ending for process in self.processes if process.ending is not None]
        found = first_cause(self._report, endings, self._heard.received)
        if found == 0:
            # A hook that ends all processes with code 0 is no end of a training.
            beats = [(rank, self._last(rank)) for rank in range(self.nproc)]
            gone = next((rank for rank, beat in beats if beat.beats and beat.phase != ENDING), None)
            return 0 if gone is None else self._failure(gone, _silence(Ending(gone, 0, 0.0)))
        if not isinstance(found, Ending):
            return found
        others = failures(self._report)
        silent = self._failure(found.rank, _silence(found))
        told, go_on = _told_by(others)
        if told:
            silent = replace(silent, told=told, go_on=go_on)
        return replace(silent, time=found.time)

    def step_of(self, failure: Failure) -> str:
        """The step in which a process failed, in words."""
        beat = self._last(failure.rank)
        return f"step {beat.step}" if beat.beats else "the start"

    def lost_its_place(self, folder: str | None) -> bool:
        """Whether a signal came to these processes after there was something to lose, and none said how to go on.

        Before the first attempt's training there is nothing to lose; what ends in order says it.
        """
        if folder is None or not (self.attempt or self._trains()):
            return False
        status = _read(RunFolder(Path(folder)), "status.json")
        in_order = status.get("state") == "interrupted" and status.get("pid") == self.processes[0].popen.pid
        return not (in_order and self._trains())

    def end(self) -> None:
        """Kills what still runs, and what the processes have left behind."""
        self._kill()
        for process in self.processes:
            process.poll(wait=True)
            process.close()


def environment(plan: WorkPlan, nproc: int, port: int) -> dict[str, str]:
    """The variables that all processes of a node have in common, in torchrun's words."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    variables = {
        **inherited,
        **threads(plan.config, nproc, inherited),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if Path("/sys/class/net/lo").exists():
        # Otherwise gloo looks up the computer's own name, which need not be known anywhere.
        variables.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return variables


def threads(config: Mapping[str, Any], nproc: int, variables: Mapping[str, str]) -> dict[str, str]:
    """OMP_NUM_THREADS for each of `nproc` processes: launch.threads, else the user's own, else cores / processes."""
    given = config.get("launch", {}).get("threads")
    if given is None and variables.get("OMP_NUM_THREADS"):
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(given or max(1, cores // nproc))}


# --- what is told --------------------------------------------------------------------------------------------------


def first_cause(report: Report, endings: list[Ending], received: int | None) -> Failure | Ending | int:
    """The first cause of a failure: what a process said, or how one ended that said nothing; else the exit code.

    The first cause is the earliest failure that is no consequence of another one; else the process that was killed or
    ended without a word, be it with code 0 while the others still needed it; else the earliest failure.
    """
    bad = sorted((ending for ending in endings if ending.code != 0), key=lambda ending: ending.time)
    if not bad:
        return 0
    found = failures(report)
    by_itself = [failure for failure in found if not failure.secondary]
    reported = {failure.rank for failure in found}
    silent = [ending for ending in bad if not (ending.by_parent or ending.rank in reported or _interrupted(ending))]
    interrupted = [ending.code for ending in bad if ending.code in (PREEMPTED, INTERRUPTED)]
    if not by_itself and not silent and (interrupted or received is not None):
        return exit_code(received) if received is not None else max(interrupted)
    if not by_itself and not silent:
        silent = [ending for ending in endings if ending.code == 0 and ending.time <= bad[0].time]
    if by_itself or silent:
        return by_itself[0] if by_itself else silent[0]
    return found[0] if found else 1


def tell(plan: WorkPlan, endings: list[Ending], received: int | None, world: int) -> int:
    """Shows the first cause of a failure, once, and returns the exit code of the whole."""
    report = Report(plan.report or "")
    found = first_cause(report, endings, received)
    if isinstance(found, int):
        return found
    if isinstance(found, Ending):
        told, go_on = _told_by(failures(report))
        host = socket.gethostname()
        found = Failure(found.rank, world, host, found.time, 1, _silence(found), told=told, go_on=go_on)
    return _show(found, plan, report)


def _told_by(others: list[Failure]) -> tuple[str | None, str | None]:
    """What failed and how to go on, as the first process says it that could say anything."""
    return next(((other.told, other.go_on) for other in others if other.told), (None, None))


def _interrupted(ending: Ending) -> bool:
    return ending.code in (PREEMPTED, INTERRUPTED)


def _show(failure: Failure, plan: WorkPlan, report: Report) -> int:
    text, moved = ("", False) if failure.rank < 0 else said(report.path(file_of(failure.rank, OUTPUT)))
    if text and not (moved and failure.traceback):
        say(f"rank {failure.rank} said:\n{text}\n", sys.stderr)
    found = failures(report)
    others = [each.problems for each in found if each.rank != failure.rank]
    if failure.problems and failure.rank != 0 and failure.problems not in others:
        say(f"rank {failure.rank} on {failure.host}, and no other process:\n", sys.stderr)
    show(failure, plan)
    _correct(failure, found, told_run(report).get("folder"))
    return failure.code


def _correct(failure: Failure, found: list[Failure], told: str | None) -> None:
    """Writes the first cause into the run's files, where the first process knew only what followed from it, or died."""
    folder = next((each.folder for each in [failure, *found] if each.folder), told)
    if folder is None or failure.problems or not Path(folder).is_dir():
        return
    run = RunFolder(Path(folder))
    summary, status = _read(run, "summary.json"), _read(run, "status.json")
    with suppress(OSError):
        run.write_json("summary.json", {**summary, "status": "failed", "error": failure.said})
        run.write_json("status.json", {**status, "state": "failed", "reason": failure.said})


def tell_interrupted(plan: WorkPlan, told: Mapping[str, str], number: int | None) -> None:
    """Says how to go on where a signal has ended the processes before they could, and writes it into the run's files.

    `told` is what `told_run` gives; where the run has no folder, or is complete, there is nothing to say. A disk that
    takes nothing ends nothing.
    """
    folder = told.get("folder")
    if folder is None or not os.path.isdir(folder):
        return
    run = RunFolder(Path(folder))
    status = _read(run, "status.json")
    if status.get("state") == "completed":
        return
    if go_on := told.get("go_on"):
        say(f"to go on: {go_on}\n", sys.stderr if plan.json else sys.stdout)
    reason = None if number is None else signal.Signals(number).name
    with suppress(OSError):
        run.write_json("status.json", {**status, "state": "interrupted", "reason": reason})
        summary = _read(run, "summary.json")
        if summary.pop("status", None) == "failed":  # an attempt before, or a process that lost the others
            summary.pop("error", None)
            run.write_json("summary.json", {"status": "interrupted", **summary})


def _signal_of(code: int) -> int:
    return signal.SIGINT if code == INTERRUPTED else signal.SIGTERM


def _read(run: RunFolder, name: str) -> dict[str, Any]:
    """A JSON file of a run; nothing where it is not there, or damaged."""
    found = run.read_json(name)
    return found if isinstance(found, dict) else {}


def _silence(ending: Ending) -> str:
    """How a process ended that could say nothing itself."""
    if ending.code >= 0:
        return f"ended with exit code {ending.code} and no error" + (", in the middle" if ending.code == 0 else "")
    number = -ending.code
    if number == signal.SIGKILL:
        peak = f" (its peak was {ending.peak / 2**20:,.0f} MiB)" if ending.peak else ""
        advice = "try a smaller batch.micro_size or fewer processes"
        return f"killed (SIGKILL), likely out of memory{peak}: {advice}"
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"killed by {name}"
