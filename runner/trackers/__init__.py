"""Trackers take the records of a run: files, TensorBoard, services."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

from runner.checkpoint.tree import split

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
    """All trackers of a run. One that fails says so and is left out; the run goes on.

    What a checkpoint holds of one stays in those that follow when it is left out, so that it may go on in another
    process; also of those that are `absent` from the start, because they could not be built.
    """

    def __init__(self, trackers: Mapping[str, Tracker], absent: Collection[str] = ()) -> None:
        self._trackers = dict(trackers)
        self._absent = tuple(absent)
        #: The last state that is known of each: told by it, or loaded.
        self._states: dict[str, Any] = {}

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
    def stateful(self) -> dict[str, _Saved]:
        """What is to be saved of them, by name."""
        having = [name for name, tracker in self._trackers.items() if hasattr(tracker, "state_dict")]
        return {name: _Saved(self, name) for name in (*having, *self._absent)}

    def state_of(self, name: str) -> Any:
        """A tracker's state; of one that is left out, or fails now, the last that is known, or None."""
        tracker: Any = self._trackers.get(name)
        if tracker is not None:
            self._try(name, lambda: self._keep(name, tracker.state_dict()), "failed to tell its state")
        return self._states.get(name)

    def _keep(self, name: str, state: Any) -> None:
        split(state, f"trackers.{name}")  # raises for what cannot be saved
        self._states[name] = deepcopy(state)

    def give_state(self, name: str, state: Any) -> None:
        """Gives a tracker what `state_of` returned."""
        self._states[name] = state
        tracker: Any = self._trackers.get(name)
        if tracker is not None and state is not None:
            self._try(name, lambda: tracker.load_state_dict(deepcopy(state)), "failed to take its state back")

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


class _Saved:
    """A tracker's part of a checkpoint: it outlives the tracker, and never ends a training."""

    def __init__(self, trackers: Trackers, name: str) -> None:
        self._trackers, self._name = trackers, name

    def state_dict(self) -> Any:
        return self._trackers.state_of(self._name)

    def load_state_dict(self, state: Any) -> None:
        self._trackers.give_state(self._name, state)
