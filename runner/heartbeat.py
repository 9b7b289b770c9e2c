"""Signs of life: a process says where it is in a few bytes of shared memory, and whoever watches notices changes."""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import NamedTuple

STARTING, DATA, TRAIN, EVALUATION, SAVING, ENDING = 0, 1, 2, 3, 4, 5

#: What a process is doing, as a message says it.
PHASES = (
    "in its start",
    "waiting for data",
    "in the training step",
    "in the evaluation",
    "saving",
    "at the end of the run",
)

#: beats, phase, step: three whole numbers of eight bytes
_SIZE = 24


class Beat(NamedTuple):
    """What a process said last: how often it has said something, what it is doing, and at which step."""

    beats: int = 0
    phase: int = STARTING
    step: int = 0

    def __str__(self) -> str:
        return PHASES[self.phase] + (f" (step {self.step})" if self.phase not in (STARTING, ENDING) else "")


class Heartbeat:
    """The side that beats: three stores into memory, no system call, no clock.

    Args:
        path: a file that is mapped, for a reader in another process; None for one in this process (`last`).
    """

    def __init__(self, path: Path | None = None) -> None:
        if path is None:
            self._cells = memoryview(bytearray(_SIZE)).cast("q")
            return
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, _SIZE)
            self._cells = memoryview(mmap.mmap(descriptor, _SIZE)).cast("q")
        finally:
            os.close(descriptor)

    def beat(self, phase: int, step: int) -> None:
        """Says that something goes on: `step` is the step that is being made."""
        cells = self._cells
        cells[1] = phase
        cells[2] = step
        cells[0] += 1

    @property
    def last(self) -> Beat:
        return Beat(*self._cells)


def last(path: Path) -> Beat:
    """What the process with this file said last; nothing yet where it has not opened it."""
    try:
        found = path.read_bytes()
    except OSError:
        return Beat()
    return Beat(*struct.unpack("=3q", found)) if len(found) == _SIZE else Beat()
