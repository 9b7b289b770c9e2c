"""Signals that end a run: the first after its step, the second at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PREEMPTED, INTERRUPTED = 75, 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def exit_code(number: int) -> int:
    return INTERRUPTED if number == signal.SIGINT else PREEMPTED


class Interrupted(BaseException):
    """A signal came before there was a training that could end in order."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = exit_code(number)


class Signals:
    """The handler: tells `run` (anything with an attribute `signal`) of the first signal; leaves at the second.

    `speaks` says whether this process tells the user that it has heard.
    """

    run: Any = None
    received = False
    speaks = True

    def __init__(self) -> None:
        self._process = os.getpid()

    def __call__(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            # A data worker, forked with this handler: the training process decides when it ends.
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.received:
            os._exit(INTERRUPTED if number == signal.SIGINT else 128 + number)
        self.received = True
        if self.run is None:
            raise Interrupted(number)
        self.run.signal = number
        if self.speaks:
            # No logging here: the signal may have come while the logger held its lock.
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: finishing this step and saving; once more to leave at once\n".encode())


@contextmanager
def handled() -> Iterator[Signals]:
    """The handler in the place of Python's own, where this is the main thread."""
    handler = Signals()
    try:
        before = {number: signal.signal(number, handler) for number in SIGNALS}
    except ValueError:
        # Not the main thread (a notebook's, a test's): signals belong to somebody else.
        yield handler
        return
    try:
        yield handler
    finally:
        for number, old in before.items():
            signal.signal(number, old)
