"""Signals that end a run: the first after its step, the second at once."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

PREEMPTED, INTERRUPTED = 75, 130

#: What is said where a signal comes before the first step.
NOTHING_TO_SAVE = "nothing to save; the same command starts again"
#: SIGHUP comes when the terminal goes; `nohup` has it ignored, and so it stays.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
#: One signal for all processes of a job comes to each of them twice: from who sent it, and handed on by a parent.
TWICE = 0.5
#: Closer together than anybody presses a key, two of a kind are one as well: a scheduler's to all processes of a job,
#: and the same from the job's script.
SAME = 0.1
#: Within this time the system has told of the end of a data worker whose connection broke.
_TOLD = 1.0

T = TypeVar("T")


def exit_code(number: int) -> int:
    return INTERRUPTED if number == signal.SIGINT else PREEMPTED


def at_once(number: int) -> int:
    """The exit code after a second signal."""
    return INTERRUPTED if number == signal.SIGINT else 128 + signal.SIGTERM


def speak_up(text: str) -> None:
    """Tells the user something from within a signal handler.

    Not by the logger: the signal may have come while that held its lock. And whoever reads may have gone with the same
    signal, as the terminal (SIGHUP) or the `tee` behind a pipe (Ctrl-C) has.
    """
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


def heard() -> list[signal.Signals]:
    """The signals that end a run here: all but those that whoever started this process has ignored."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


class Interrupted(BaseException):
    """A signal came before there was a training that could end in order, or while data were waited for."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.exit_code = exit_code(number)


class Signals:
    """The handler: tells `run` (anything with an attribute `signal`) of the first signal; leaves at the second.

    `speaks` says whether this process tells the user that it has heard, `handed_on` whether a parent hands signals on,
    `over` that the process ends anyway: a first signal changes nothing then.
    """

    speaks = True
    handed_on = False
    over = False
    #: Whether the data are waited for whatever comes.
    patient = False
    #: The command that goes on, where no parent says it after a second signal.
    go_on: str | None = None

    def __init__(self) -> None:
        self.received: int | None = None
        self._run: Any = None
        self._began = False
        self._process = os.getpid()
        self._when = 0.0
        self._waits = 0

    @property
    def run(self) -> Any:
        return self._run

    @run.setter
    def run(self, run: Any) -> None:
        self._run = run
        self._began = self._began or run is not None
        # Where code in between has swallowed the exception of a signal, the training still hears of it.
        if run is not None and self.received is not None:
            run.signal = self.received

    def __call__(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return  # a process that was forked past Python: the training process decides when it ends
        if self.received is not None:
            same = TWICE if self.handed_on else SAME if number == self.received else 0.0
            if time.monotonic() - self._when < same:
                return
            if self.go_on is not None:
                speak_up(f"to go on: {self.go_on}")
            os._exit(at_once(number))
        self.received, self._when = number, time.monotonic()
        if self.over:
            return
        if self._run is None:
            raise Interrupted(number)
        self._run.signal = number
        if self.speaks:
            speak_up(f"{signal.Signals(number).name}: finishing this step and saving; once more to leave at once")
        if self._waits and not self.patient:
            raise Interrupted(number)

    def cause(self, error: BaseException) -> BaseException:
        """What has ended a start: an error, or the signal before it.

        What a signal raises may come out as another error: an import makes a RuntimeError of it (`__set_name__`).
        """
        return error if self.received is None or self._began else Interrupted(self.received)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While data workers are waited for: a signal ends the wait with Interrupted."""
        self._waits += 1
        try:
            if self.received is not None and not self.patient:
                raise Interrupted(self.received)
            yield
        finally:
            self._waits -= 1


@contextmanager
def handled() -> Iterator[Signals]:
    """The handler in the place of Python's own, where this is the main thread."""
    handler = Signals()
    fresh_in_forks()
    try:
        before = {number: signal.signal(number, handler) for number in heard()}
    except ValueError:
        # Not the main thread (a notebook's, a test's): signals belong to somebody else.
        yield handler
        return
    try:
        yield handler
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def patient() -> Iterator[None]:
    """A signal that comes within ends no wait for a data worker."""
    handler: Any = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, Signals):
        handler.patient = True
    try:
        yield
    finally:
        if isinstance(handler, Signals):
            handler.patient = False


def awaited(get: Any, *arguments: T) -> Any:
    """What a call gives that waits for a data worker; raises Interrupted when a signal comes meanwhile."""
    handler = signal.getsignal(signal.SIGTERM)
    if not isinstance(handler, Signals):
        return get(*arguments)
    try:
        with handler.waiting():
            return get(*arguments)
    except Interrupted:
        end_workers()  # before their loader goes, which would wait some seconds for each of them
        raise
    except (ConnectionError, EOFError):
        # A worker that dies closes its connections first. Once the system tells of its end, torch's handler of that
        # raises the true cause: here, and not where this one is being told.
        time.sleep(_TOLD)
        raise


# --- processes that a training process has started -------------------------------------------------------------------


def deaf(number: int, frame: Any) -> None:
    """Ends nothing. Unlike a signal that is ignored, it is not handed on to programs that are started."""


def tell_by(descriptor: int) -> None:
    """Lets the system write each signal that this process gets into a pipe, whatever it is doing."""
    _pipes.append(descriptor)
    signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)


def fresh_in_forks() -> None:
    """From now on processes that are forked from this one, as by a user's Pool, hear signals as any other does.

    With the handlers of a training they would swallow a SIGTERM, and whoever has ended them would wait for ever. A
    Ctrl-C they leave to the training process, which ends after its step.
    """
    if not _fresh:
        _fresh.append(True)
        os.register_at_fork(after_in_child=_freshen)


_pipes: list[int] = []
_fresh: list[bool] = []


def _freshen() -> None:
    if _pipes and (other := signal.set_wakeup_fd(-1)) not in (-1, *_pipes):
        signal.set_wakeup_fd(other)  # an event loop's
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if str(getattr(handler, "__module__", None)).partition(".")[0] == "runner":
            signal.signal(number, deaf if number == signal.SIGINT else signal.SIG_DFL)
    for number in (signal.SIGTSTP, signal.SIGCONT):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)  # the watchdog's ear, of which Python does not know (launch.watch)


#: The data workers, among all that a user's code may have started.
_workers: set[Any] = set()


@contextmanager
def starting_workers() -> Iterator[None]:
    """What is started within are data workers. They get no signal before they know that they are (data.worker)."""
    there = set(multiprocessing.active_children())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        now = set(multiprocessing.active_children())
        _workers.intersection_update(now)
        _workers.update(now - there)


def end_with(parent: int) -> None:
    """Asks the system to kill this process when its parent dies, where it can, and makes sure that it still lives."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def end_workers() -> None:
    """Ends the data workers of this process at once: a busy one would be waited for, and they hear no signal."""
    children = [child for child in multiprocessing.active_children() if child in _workers]
    if not children:
        return
    try:
        # torch's handler would raise an error for each of them.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except ValueError:
        return  # not the main thread
    for child in children:
        child.kill()
    for child in children:
        child.join(1.0)
