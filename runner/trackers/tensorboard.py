"""TensorBoard event files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

#: Neither is of use beside the step and the wall time that TensorBoard keeps itself.
_LEFT_OUT = ("split", "step", "samples", "time")


class TensorBoard:
    """Writes the numbers of every record as SPLIT/NAME into RUN/tensorboard.

    The writer is imported with the first records, so that the first training step does not wait for it. Records are
    handed to it every `seconds` at most, and at the end: its thread would otherwise get in the way of the training's
    after every record.
    """

    def __init__(self, folder: str = "tensorboard", seconds: float = 5.0) -> None:
        self._name = folder
        self._pause = seconds
        self._writer: Any = None
        self._waiting: list[tuple[float, Mapping[str, Any]]] = []

    def start(self, folder: Path, step: int, config: Mapping[str, Any]) -> None:
        if find_spec("tensorboard") is None:
            raise ModuleNotFoundError("the package tensorboard is not installed (pip install tensorboard)")
        self._folder = folder / self._name
        self._folder.mkdir(exist_ok=True)
        # Also at step 0: a run that died before its first checkpoint has left records, and begins anew.
        left = any(self._folder.iterdir())
        self._step, self._purge = step, step + 1 if left else None
        #: Splits of which there is a record of this very step; None: not looked yet.
        self._there: set[str] | None = None if left else set()
        self._next = time.monotonic() + self._pause

    def log(self, record: Mapping[str, Any]) -> None:
        if record["step"] == self._step and self._is_there(record["split"]):
            return  # an evaluation that was owed, made again
        self._waiting.append((time.time(), record))
        if time.monotonic() >= self._next:
            self._write()

    def _is_there(self, split: str) -> bool:
        """Whether the files have a record of the step that is gone on from: they are read only where that matters."""
        if self._there is None:
            self._there = _splits_of(self._folder, self._step)
        return split in self._there

    def flush(self) -> None:
        if self._waiting:
            self._write()

    def rewind(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._step, self._there = step, None
        self._waiting = [(when, record) for when, record in self._waiting if record["step"] <= step]
        self.flush()
        if self._writer is not None:
            restart = SessionLog(status=SessionLog.START)
            self._writer.file_writer.add_event(Event(step=step + 1, session_log=restart))
            self._writer.flush()

    def _write(self) -> None:
        """One event for each record: an event for each number, as add_scalar has it, costs several times as much."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            _wait_for_a_later_name(self._folder)
            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge)
        for when, record in self._waiting:
            values = [
                Summary.Value(tag=f"{record['split']}/{name}", simple_value=value)
                for name, value in record.items()
                if name not in _LEFT_OUT and isinstance(value, (int, float))
            ]
            self._writer.file_writer.add_summary(Summary(value=values), record["step"], when)
        self._waiting.clear()
        self._writer.flush()
        self._next = time.monotonic() + self._pause

    def close(self) -> None:
        self.flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _wait_for_a_later_name(folder: Path) -> None:
    """Event files are read in the order of their names, which begin with the second in which they were made."""
    stamps = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")]
    last = max(stamps, default=0)
    while time.time() < last + 1 < time.time() + 2:
        time.sleep(0.02)


def _splits_of(folder: Path, step: int) -> set[str]:
    """The splits that event files have a record of a step of, as a reader of them sees it."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    there: set[str] = set()
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            if event.HasField("session_log") and event.step <= step:
                there.clear()  # where a writer began anew, what it went back behind does not count
            elif event.step == step:
                there.update(value.tag.partition("/")[0] for value in event.summary.value)
    return there
