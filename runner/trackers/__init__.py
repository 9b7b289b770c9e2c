"""Trackers take the records of a run: files, TensorBoard, services."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

_log = logging.getLogger("runner")


class Tracker(Protocol):
    """What a tracker is: any class with these three methods.

    `flush()` is called, where there is one, before a checkpoint is saved: what was recorded so far is to survive a
    crash. `state_dict()` and `load_state_dict(state)` (JSON values) put something into checkpoints, such as the name
    under which a service knows the run; it is loaded before `start`. After a rollback `rewind(step)` is called with
    the step that the run went back to; a tracker without it is closed, and started anew with that step. An evaluation
    record of the very step that it starts from may come although it came before: one that was owed is made again.
    """

    def start(self, folder: Path, step: int, config: Mapping[str, Any]) -> None:
        """Before the first record. `step` finished steps are resumed from: what was recorded after them is to go."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Takes a training or evaluation record (keys `split` and `step`, numbers otherwise)."""

    def close(self) -> None:
        """Writes what is left."""


class Trackers:
    """All trackers of a run. One that fails says so and is left out; the run goes on."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    def start(self, folder: Path, step: int, config: Mapping[str, Any]) -> None:
        for name in list(self._trackers):
            self.start_one(name, folder, step, config)

    def start_one(self, name: str, folder: Path, step: int, config: Mapping[str, Any]) -> None:
        if name in self._trackers:
            self._try(name, lambda: self._trackers[name].start(folder, step, config), "failed to start")

    def log(self, record: Mapping[str, Any]) -> None:
        for name, tracker in list(self._trackers.items()):
            self._try(name, lambda tracker=tracker: tracker.log(record), "failed")

    def flush(self) -> None:
        for name, tracker in list(self._trackers.items()):
            flush = getattr(tracker, "flush", None)
            if flush is not None:
                self._try(name, flush, "failed")

    def restart(self, folder: Path, step: int, config: Mapping[str, Any]) -> None:
        """Goes back: what was recorded after `step` finished steps is to go."""
        for name, tracker in list(self._trackers.items()):
            rewind = getattr(tracker, "rewind", None)
            if rewind is not None:
                self._try(name, lambda rewind=rewind: rewind(step), "failed")
                continue
            self._try(name, tracker.close, "failed to close")
            self.start_one(name, folder, step, config)

    def close(self) -> None:
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.close, "failed to close")
        self._trackers.clear()

    @property
    def stateful(self) -> dict[str, Any]:
        """Those that have something to be saved."""
        return {name: tracker for name, tracker in self._trackers.items() if hasattr(tracker, "state_dict")}

    def _try(self, name: str, call: Any, what: str) -> None:
        try:
            call()
        except Exception as error:
            _log.warning(
                "tracker %s %s and is left out from here on; the run goes on: %s: %s",
                name,
                what,
                type(error).__name__,
                error,
            )
            self._trackers.pop(name, None)
