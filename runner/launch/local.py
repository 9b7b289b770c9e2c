"""The parent of one node's processes: starts them, hands on signals, waits, ends what is left, tells of a failure."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.errors import RunnerError
from runner.folder import RunFolder
from runner.launch.failure import Failure, capture, failures, said, show
from runner.launch.worker import WorkPlan, command
from runner.signals import INTERRUPTED, PREEMPTED, SIGNALS, exit_code

#: Seconds for the others once a process has failed, and once one has ended after a signal: they are saving as well.
_GRACE, _GRACE_SAVING = 3.0, 30.0
_POLL = 0.02


def supervise(work: str, plan: WorkPlan, nproc: int) -> int:
    """Runs MODULE:FUNCTION in `nproc` processes of this computer; no process is left, whatever happens.

    Rank 0 keeps the terminal. The first cause of a failure is told last. Returns the exit code of the whole.
    """
    with tempfile.TemporaryDirectory(prefix="runner-", ignore_cleanup_errors=True) as folder:
        plan = replace(plan, report=folder)
        node = Node(work, plan, nproc)
        with node.signals():
            try:
                node.start()
                node.wait()
            finally:
                node.end()
        if node.left is not None:
            return node.left
        endings = [process.ending for process in node.processes if process.ending is not None]
        return tell(plan, endings, node.received, nproc)


@dataclass(frozen=True)
class Ending:
    """How a process ended: its code (negative: the signal), when, and whether its parent ended it."""

    rank: int
    code: int
    time: float
    by_parent: bool = False


class Process:
    """One rank: a process in a group of its own, so that its data workers end with it."""

    def __init__(self, rank: int, popen: subprocess.Popen[bytes]) -> None:
        self.rank = rank
        self.popen = popen
        self.ending: Ending | None = None
        self._killed = False

    def poll(self) -> Ending | None:
        if self.ending is None and (code := self.popen.poll()) is not None:
            self.ending = Ending(self.rank, code, time.time(), self._killed)
        return self.ending

    def kill(self) -> None:
        """Kills the process and what it has started."""
        self._killed = self._killed or self.poll() is None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)


class Node:
    """The processes of one computer, from their start to their end.

    `received` is the first signal that this process got, `left` the exit code once a second one has ended it all.
    """

    def __init__(self, work: str, plan: WorkPlan, nproc: int) -> None:
        self.work = work
        self.plan = plan
        self.nproc = nproc
        self.processes: list[Process] = []
        self.received: int | None = None
        self.left: int | None = None

    def start(self) -> None:
        """Starts all processes. The store's port is open before, and rank 0 inherits it: no other program can take it.

        Raises RunnerError where the system allows no more processes.
        """
        folder = Path(self.plan.report or "")
        plan = folder / "plan.json"
        self.plan.save(plan)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            common = environment(self.plan, self.nproc, listening.getsockname()[1])
            for rank in range(self.nproc):
                descriptor = listening.fileno() if rank == 0 and self.nproc > 1 else None
                words = [sys.executable, *command(self.work, plan, listen=descriptor)]
                here = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                self._start(rank, words, here, descriptor, folder)

    def _start(self, rank: int, words: list[str], variables: dict[str, str], descriptor: int | None, to: Path) -> None:
        output = None if rank == 0 else capture(to / f"rank_{rank}.out")
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            popen = subprocess.Popen(
                words,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=() if descriptor is None else (descriptor,),
                process_group=0,
            )
            self.processes.append(Process(rank, popen))
        except OSError as error:
            raise RunnerError(f"process {rank + 1} of {self.nproc} cannot be started: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if output is not None:
                os.close(output)
        if self.received is not None:
            popen.send_signal(self.received)

    def wait(self) -> None:
        """Until all have ended. When one fails, the others get a moment to fail, or to save, as well."""
        while True:
            endings = [process.poll() for process in self.processes]
            if all(endings):
                return
            bad = [ending for ending in endings if ending is not None and ending.code != 0]
            if bad:
                saving = all(ending.code in (PREEMPTED, INTERRUPTED) for ending in bad)
                if time.time() > min(ending.time for ending in bad) + (_GRACE_SAVING if saving else _GRACE):
                    return
            time.sleep(_POLL)

    def end(self) -> None:
        """Kills what still runs, and what the processes have left behind."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.popen.wait()
            process.poll()

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Hands the signals that end a run on to all processes; the second one ends them at once."""

        def forward(number: int, frame: Any) -> None:
            if self.received is not None:
                self.left = INTERRUPTED if number == signal.SIGINT else 128 + number
                for process in self.processes:
                    process.kill()
                return
            self.received = number
            for process in self.processes:
                process.popen.send_signal(number)

        try:
            before = {number: signal.signal(number, forward) for number in SIGNALS}
        except ValueError:
            # Not the main thread: signals belong to somebody else.
            yield
            return
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)


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


def tell(plan: WorkPlan, endings: list[Ending], received: int | None, world: int) -> int:
    """Shows the first cause of a failure, once, and returns the exit code of the whole.

    The first cause is the earliest failure that is no consequence of another one; else the process that was killed or
    ended without a word, be it with code 0 while the others still needed it; else the earliest failure.
    """
    bad = sorted((ending for ending in endings if ending.code != 0), key=lambda ending: ending.time)
    if not bad:
        return 0
    folder = Path(plan.report or "")
    found = failures(folder)
    by_itself = [failure for failure in found if not failure.secondary]
    reported = {failure.rank for failure in found}
    silent = [ending for ending in bad if not (ending.by_parent or ending.rank in reported or _interrupted(ending))]
    interrupted = [ending.code for ending in bad if ending.code in (PREEMPTED, INTERRUPTED)]
    if not by_itself and not silent and (interrupted or received is not None):
        return exit_code(received) if received is not None else max(interrupted)
    if not by_itself and not silent:
        silent = [ending for ending in endings if ending.code == 0 and ending.time <= bad[0].time]
    if by_itself or silent:
        return _show(by_itself[0] if by_itself else _silent(silent[0], world, found), plan, folder)
    return _show(found[0], plan, folder) if found else 1


def _interrupted(ending: Ending) -> bool:
    return ending.code in (PREEMPTED, INTERRUPTED)


def _show(failure: Failure, plan: WorkPlan, folder: Path) -> int:
    text, moved = said(folder / f"rank_{failure.rank}.out")
    if text and not (moved and failure.traceback):
        print(f"rank {failure.rank} said:\n{text}", file=sys.stderr)
    found = failures(folder)
    others = [each.problems for each in found if each.rank != failure.rank]
    if failure.problems and failure.rank != 0 and failure.problems not in others:
        print(f"rank {failure.rank} on {failure.host}, and no other process:", file=sys.stderr)
    show(failure, plan)
    _correct(failure, found)
    return failure.code


def _correct(failure: Failure, found: list[Failure]) -> None:
    """Writes the first cause into the run's files, where the first process knew only what followed from it, or died."""
    folder = next((each.folder for each in [failure, *found] if each.folder), None)
    if folder is None or failure.problems or not Path(folder).is_dir():
        return
    run = RunFolder(Path(folder))
    where = f"rank {failure.rank} on {failure.host}: {failure.error}" if failure.world_size > 1 else failure.error
    summary, status = run.read_json("summary.json") or {}, run.read_json("status.json") or {}
    with suppress(OSError):
        run.write_json("summary.json", {**summary, "status": "failed", "error": where})
        run.write_json("status.json", {**status, "state": "failed", "reason": where})


def _silent(ending: Ending, world: int, others: list[Failure]) -> Failure:
    """A failure of which the process itself could say nothing; what the others know is taken from them."""
    error = f"ended with exit code {ending.code} and no error" + (", in the middle" if ending.code == 0 else "")
    if ending.code < 0:
        number = -ending.code
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        error = f"killed by {name}"
        if number == signal.SIGKILL:
            error = "killed (SIGKILL), likely out of memory: try a smaller batch.micro_size or fewer processes"
    told, go_on = next(((each.told, each.go_on) for each in others if each.told), (None, None))
    return Failure(ending.rank, world, socket.gethostname(), ending.time, 1, error, told=told, go_on=go_on)
