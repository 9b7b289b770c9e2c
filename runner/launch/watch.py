"""Hangs: who has made no progress since when, the stacks of all processes in one file, and who lags behind."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.heartbeat import DATA, EVALUATION, Beat, Heartbeat

#: Seconds that imports, downloads, building and compiling may take, where launch.timeout is shorter.
START = 3600.0
#: Seconds between two looks at the signs of life.
LOOK = 0.05
#: Steps in which a model that is compiled may still compile.
_COMPILES = 3
#: Seconds for the stacks of one process.
_ANSWERS = 0.25

#: Frames in which a process waits for others, and those that say nothing about the user's own code.
_TOGETHER = re.compile(r"torch/distributed/|runner/distributed\.py|torch/autograd/graph\.py|deepspeed/comm/")
_LIBRARY = re.compile(r"site-packages/|dist-packages/|lib/python3|<frozen|<string>")
_PACKAGE = Path(__file__).resolve().parent.parent
_LAST = re.compile(r"( in <module>| in _run_module_as_main|  \.\.\.)\n$")
_STOPPED_WORKER = re.compile(r"\ndata worker (\d+): stopped")
_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)')


def dump_signal() -> int:
    """The signal at which a process writes its stacks: one that neither people nor libraries use."""
    return signal.SIGRTMIN + 9 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2


def answer(path: Path) -> None:
    """Lets this process, and those forked from it, write their stacks into a file when they are asked.

    Works from within the signal handler: also while the GIL is held, or a call of a C library blocks.
    """
    file = path.open("a")
    # Kept open for ever: the handler knows the descriptor only.
    faulthandler.register(dump_signal(), file=os.dup(file.fileno()), all_threads=True, chain=False)
    file.close()


class Watch:
    """Looks at the signs of life of some processes; time in which nobody looked does not count.

    Args:
        read: for each process what it said last.
        timeout: seconds without progress of any of them that count as a hang, once training has begun.
        compiles: whether the first steps compile the model.
    """

    def __init__(self, read: Sequence[Callable[[], Beat]], timeout: float, *, compiles: bool = False) -> None:
        self._read = read
        self._timeout = timeout
        self._compiles = compiles
        self._looked = time.monotonic()
        self.beats = [Beat() for _ in read]
        self.since = [self._looked for _ in read]
        self._first: int | None = None
        #: When anything has changed last.
        self.changed = self._looked

    def look(self) -> bool:
        """Whether the processes hang. One that goes on while the others wait for it is no hang."""
        now = time.monotonic()
        away = now - self._looked - 1.0
        if away > 0:  # this process was stopped, perhaps with all of them
            self.leave_out(away)
        self._looked = now
        for rank, read in enumerate(self._read):
            beat = read()
            if beat.beats != self.beats[rank].beats:
                self.beats[rank], self.since[rank], self.changed = beat, now, now
        return now - self.changed >= self.limit

    def leave_out(self, seconds: float) -> None:
        """Does not count the last seconds."""
        self.since = [since + seconds for since in self.since]
        self.changed += seconds
        self._looked += seconds

    @property
    def limit(self) -> float:
        """Seconds without progress that count as a hang now."""
        if not all(beat.beats for beat in self.beats):
            return max(START, self._timeout)
        step = max(beat.step for beat in self.beats)
        if self._first is None:
            self._first = step
        if self._compiles and step < self._first + _COMPILES:
            return max(START, self._timeout)
        return self._timeout

    def waited(self, rank: int) -> float:
        return time.monotonic() - self.since[rank]


@dataclass(frozen=True)
class View:
    """A process that hangs, or waits for one that does."""

    rank: int
    beat: Beat
    stopped: bool
    stacks: str

    @property
    def frames(self) -> list[tuple[str, int, str]]:
        """The main thread's, innermost first."""
        blocks = re.split(r"\n(?=\S)", self.stacks.split("\ndata worker ")[0])
        found = [[(m["file"], int(m["line"]), m["name"]) for m in _FRAME.finditer(block)] for block in blocks]
        mains = [frames for frames in found if frames and frames[-1][2] in ("<module>", "_run_module_as_main")]
        return (mains or [frames for frames in found if frames] or [[]])[-1]

    @property
    def waits_for_others(self) -> bool:
        return any(_TOGETHER.search(file) for file, _, _ in self.frames[:4])

    @property
    def where(self) -> str:
        """The user's own code, where it is in the stack; where data are waited for, a worker's, or which is stopped."""
        frames = self.frames
        if self.beat.phase in (DATA, EVALUATION):
            if still := _STOPPED_WORKER.search(self.stacks):
                return f", data worker {still[1]} is stopped (SIGSTOP)"
            _, _, workers = self.stacks.partition("\ndata worker ")
            frames = [*frames, *((m["file"], int(m["line"]), m["name"]) for m in _FRAME.finditer(workers))]
        own = next((f for f in frames if not (_LIBRARY.search(f[0]) or _PACKAGE in Path(f[0]).parents)), None)
        return "" if own is None else f", in {own[2]} ({Path(own[0]).name}:{own[1]})"


def blame(views: Sequence[View]) -> tuple[int, str]:
    """The process that the others wait for, and what to say of it."""
    stopped = [view for view in views if view.stopped]
    if stopped:
        return stopped[0].rank, f"stopped (SIGSTOP) {stopped[0].beat}"
    own = [view for view in views if not view.waits_for_others]
    if own:
        lags = min(own, key=lambda view: view.beat.beats)
        return lags.rank, f"{lags.beat}{lags.where}"
    if len(views) == 1:
        return views[0].rank, f"{views[0].beat}{views[0].where}"
    lags = min(views, key=lambda view: view.beat.beats)
    calls = ", ".join(f"rank {view.rank} {view.beat}{_call(view)}" for view in views[:8])
    return lags.rank, f"all processes wait for each other in calls that differ: {calls}"


def _call(view: View) -> str:
    """The collective in which a process waits, and where the user's code called it."""
    inner = next((f for f in view.frames if _TOGETHER.search(f[0]) and f[2] != "wrapper"), None)
    return f" in {inner[2]}{view.where}" if inner else view.where


# --- the stacks of other processes ------------------------------------------------------------------------------------


def stopped(pid: int) -> bool:
    """Whether a process is stopped, by SIGSTOP or a debugger."""
    return _stat(pid)[:1] in (["T"], ["t"])


def _stat(pid: int) -> list[str]:
    """State, parent, group … of a process, as /proc has them; nothing where it has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def workers_of(pid: int) -> list[int]:
    """The processes that were forked from one and run its program."""
    try:
        program = Path(f"/proc/{pid}/cmdline").read_bytes()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    found = []
    for child in map(int, children):
        with suppress(OSError):
            if Path(f"/proc/{child}/cmdline").read_bytes() == program:
                found.append(child)
    return found


def ask(pids: Sequence[int], files: Sequence[Path]) -> list[str]:
    """The stacks of processes that `answer`, each into its file, and of their data workers after their own."""
    still = [stopped(pid) for pid in pids]
    for pid in pids:
        _signal(pid, dump_signal())
    _wait(path for path, stands in zip(files, still, strict=True) if not stands)
    for pid, path, stands in zip(pids, files, still, strict=True):
        if stands:
            _signal(pid, signal.SIGCONT)
            _wait([path])
            _signal(pid, signal.SIGSTOP)  # it is to say where it stands, and not to go on
    asked = [(path, worker) for pid, path in zip(pids, files, strict=True) for worker in workers_of(pid)]
    for path, worker in asked[:16]:
        with path.open("a") as file:
            file.write(_of_worker(worker))
        before = path.stat().st_size
        _signal(worker, dump_signal())
        until = time.monotonic() + 0.02
        while time.monotonic() < until and path.stat().st_size == before:
            time.sleep(0.002)
    return [path.read_text(errors="replace") for path in files]


def _of_worker(pid: int) -> str:
    return f"\ndata worker {pid}: {'stopped (SIGSTOP)' if stopped(pid) else 'runs'}\n"


def _wait(files: Iterable[Path]) -> None:
    """Until the processes of these files have answered; not for ever."""
    files, until = list(files), time.monotonic() + _ANSWERS
    while time.monotonic() < until and not all(map(_complete, files)):
        time.sleep(0.001)


def _complete(path: Path) -> bool:
    """Whether a process has answered: its main thread comes last, from its innermost frame to the program itself."""
    with suppress(OSError):
        return _LAST.search(path.read_text(errors="replace")) is not None
    return False


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def write_stacks(folder: Path | None, parts: Sequence[tuple[str, str]]) -> Path | None:
    """Puts stacks (title, text) into logs/stacks.txt of a run's folder; None where that cannot be."""
    if folder is None:
        return None
    text = "".join(f"=== {title}\n{stacks.strip() or 'no answer'}\n\n" for title, stacks in parts)
    try:
        (folder / "logs").mkdir(exist_ok=True)
        path = folder / "logs" / "stacks.txt"
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        return None
    return path


def told(seconds: float, what: str, path: Path | None) -> str:
    """The one line about a hang."""
    stacks = f"; the stacks of all processes are in {path}" if path else ""
    return f"hang: no progress for {seconds:.0f} s (launch.timeout): {what}{stacks}"


# --- a process that nobody watches ------------------------------------------------------------------------------------


class Ear:
    """Hears a signal also while a call of C keeps Python from its handlers: in a collective, or with the GIL held.

    The handler is faulthandler's, which writes into a pipe; what it writes is of no interest.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._pipe = os.pipe()
        for descriptor in self._pipe:
            os.set_blocking(descriptor, False)
        faulthandler.register(number, file=self._pipe[1], all_threads=False, chain=False)

    def heard(self) -> bool:
        """Whether the signal has come since the last call."""
        found = False
        with suppress(BlockingIOError):
            while os.read(self._pipe[0], 65536):
                found = True
        return found

    def close(self) -> None:
        faulthandler.unregister(self._number)
        for descriptor in self._pipe:
            os.close(descriptor)


class Watchdog:
    """Watches this process from within, where no parent does: alone, or under another launcher.

    A thread looks at the signs of life and, at a hang, writes the stacks and calls `ends` with what to say. Where a
    call holds the GIL, no thread of Python runs any more: timers of the system, wound up again while all goes well,
    then write the stacks into the file and to stderr, and end the process with code 1.

    The timers would go on while the process is stopped, and end it when it goes on. So it stops in order: asked to by
    SIGTSTP (Ctrl-Z; SLURM's suspend, before its SIGSTOP), the thread puts the timers away before. Of a SIGSTOP alone
    nobody hears before it has come.

    Args:
        heartbeat: what the loop beats.
        folder: the run's.
        ends: tells of the hang and ends the process.
    """

    _PAUSE = 0.2

    def __init__(
        self,
        heartbeat: Heartbeat,
        timeout: float,
        folder: Path,
        ends: Callable[[str], Any],
        *,
        rank: int = 0,
        compiles: bool = False,
    ) -> None:
        self._heartbeat = heartbeat
        self._watch = Watch([lambda: heartbeat.last], timeout, compiles=compiles)
        self._timeout = timeout
        self._folder = folder
        self._ends = ends
        self._rank = rank
        self._over = threading.Event()
        self._file: Any = None
        self._error = _descriptor(sys.stderr)
        self._alarm = False
        self._ears: list[Ear] = []
        self._wound = 0.0
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> Watchdog:
        (self._folder / "logs").mkdir(exist_ok=True)
        self._file = (self._folder / "logs" / "stacks.txt").open("a", encoding="utf-8")
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:
            faulthandler.register(signal.SIGALRM, file=self._file.fileno(), all_threads=True, chain=False)
            self._alarm = True
        if main and signal.getsignal(signal.SIGTSTP) is signal.getsignal(signal.SIGCONT) is signal.SIG_DFL:
            self._ears = [Ear(signal.SIGTSTP), Ear(signal.SIGCONT)]
        self._wind()  # here: the thread may not come to it any more
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the watch; the timers are off."""
        self._over.set()
        self._thread.join(2.0)
        self._unwind()
        if self._alarm:
            faulthandler.unregister(signal.SIGALRM)
        for ear in self._ears:
            ear.close()
        if self._file is not None:
            empty = self._file.tell() == 0
            path = Path(self._file.name)
            self._file.close()
            with suppress(OSError):
                if empty and path.stat().st_size == 0:
                    path.unlink()

    def _run(self) -> None:
        pause = min(self._PAUSE, self._timeout / 4)
        while not self._over.wait(pause):
            if self._asked_to_stop():
                self._stops()
            if self._watch.look():
                self._hangs()
                return
            # In a start nothing beats, but this thread runs.
            if self._watch.changed > self._wound or self._watch.limit > self._timeout:
                self._wind()

    def _wind(self) -> None:
        """Sets the timers to a little after the moment at which this thread would tell of a hang."""
        self._wound = time.monotonic()
        seconds = self._timeout + 2 * self._PAUSE
        if self._alarm and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        faulthandler.dump_traceback_later(seconds + 0.1, exit=True, file=self._error or self._file)

    def _unwind(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _asked_to_stop(self) -> bool:
        """Whether SIGTSTP has come; not where SIGCONT came as well, which would not come again."""
        stop, go_on = [ear.heard() for ear in self._ears] or [False, False]
        return stop and not go_on

    def _stops(self) -> None:
        """Stops the whole process, for its shell like any other; comes back when it goes on."""
        self._unwind()
        before = time.monotonic()
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # to this thread: it does not run on meanwhile
        self._watch.leave_out(time.monotonic() - before)
        if not self._over.is_set():
            self._asked_to_stop()  # the SIGCONT that has just come
            self._wind()

    def _hangs(self) -> None:
        self._unwind()
        file = self._file
        file.write(f"=== rank {self._rank}, process {os.getpid()}, {self._watch.beats[0]}\n")
        file.flush()
        faulthandler.dump_traceback(file=file.fileno(), all_threads=True)
        stacks = _main_stack()
        for worker in workers_of(os.getpid()):
            line = _of_worker(worker)
            file.write(line)
            stacks += line
        file.flush()
        view = View(self._rank, self._watch.beats[0], False, stacks)
        if view.waits_for_others and not self._over.is_set():
            self._over.wait(0.3)  # the one that they wait for speaks first
        what = f"rank {self._rank} {view.beat}{view.where}" if self._rank else f"{view.beat}{view.where}"
        self._ends(told(self._watch.limit, what, Path(file.name)))


def _main_stack() -> str:
    """The main thread's stack in faulthandler's words."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    lines = []
    while frame is not None:
        lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno} in {frame.f_code.co_name}')
        frame = frame.f_back
    return "\n".join(["Current thread (most recent call first):", *lines])


def _descriptor(stream: Any) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None
