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
        self._purge = step + 1 if step else None
        self._next = time.monotonic() + self._pause

    def log(self, record: Mapping[str, Any]) -> None:
        self._waiting.append((time.time(), record))
        if time.monotonic() >= self._next:
            self._write()

    def _write(self) -> None:
        """One event for each record: an event for each number, as add_scalar has it, costs several times as much."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

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
        if self._waiting:
            self._write()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
