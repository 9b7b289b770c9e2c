"""Records of people's own loops on their way to trackers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from runner.errors import wrong
from runner.trackers import Tracker, Trackers
from runner.trackers.jsonl import Jsonl
from runner.trackers.tensorboard import TensorBoard

#: A step after which there are no records: nothing is to go.
_NEVER = 2**62

_KNOWN: dict[str, Any] = {"jsonl": Jsonl, "tensorboard": TensorBoard}


def build_trackers(wanted: Any) -> dict[str, Tracker]:
    """Trackers by name: "jsonl", "tensorboard", "all", objects with start, log and close, or a list of these."""
    asked = [] if wanted is None else list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
    found: dict[str, Tracker] = {}
    for one in asked:
        if one == "all":
            found |= {name: kind() for name, kind in _KNOWN.items()}
        elif isinstance(one, str):
            if one not in _KNOWN:
                fix = f"one of {', '.join(['all', *_KNOWN])}, or an object with start, log and close"
                raise wrong("trackers", "is no tracker that is known here", fix, value=one)
            found[one] = _KNOWN[one]()
        elif all(callable(getattr(one, word, None)) for word in ("start", "log", "close")):
            found[getattr(one, "name", type(one).__name__.lower())] = one
        else:
            raise wrong(
                "trackers", f"a {type(one).__name__} has no start, log and close", "see runner.trackers.Tracker"
            )
    return found


class Records:
    """How far the records of a loop have come; saved with its state."""

    def __init__(self) -> None:
        self.calls = 0
        #: The highest step that a record has.
        self.step = 0
        #: Whether a state was loaded that was saved after records had been made.
        self.known = False

    def note(self, step: int | None) -> int:
        """The step of a new record: the one that is given, or the number of calls."""
        self.calls += 1
        found = self.calls if step is None else int(step)
        self.step = max(self.step, found)
        return found

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls, "step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.calls, self.step, self.known = state["calls"], state["step"], state["calls"] > 0


class Tracking:
    """The trackers of one run; only the main process has any."""

    def __init__(self, wanted: Any, folder: Path, config: Mapping[str, Any], records: Records, *, main: bool) -> None:
        self.by_name = build_trackers(wanted)
        self._trackers = Trackers(self.by_name if main else {})
        self._folder, self._config, self._records, self._main = folder, dict(config), records, main
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            for name, tracker in self.by_name.items():
                self._start(name, tracker)

    def _start(self, name: str, tracker: Tracker) -> None:
        """What a run before has recorded stays, but for what lies after the state that was loaded."""
        step = self._records.step if self._records.known else _NEVER if isinstance(tracker, Jsonl) else 0
        self._trackers.start_one(name, self._folder, step, self._config)

    def resumed(self) -> None:
        """A state was loaded after the trackers were started: files go back to where they were with it."""
        for name, tracker in self.by_name.items() if self._main else ():
            if isinstance(tracker, tuple(_KNOWN.values())):
                tracker.close()
                self._start(name, tracker)

    def log(self, values: Mapping[str, Any], step: int | None, split: str) -> None:
        plain = {name: value.item() if _is_number(value) else value for name, value in values.items()}
        self._trackers.log({"split": split, "step": self._records.note(step), **plain})

    def close(self) -> None:
        self._trackers.close()


def _is_number(value: Any) -> bool:
    """A tensor or array of one element."""
    if isinstance(value, Tensor):
        return value.numel() == 1
    return hasattr(value, "item") and getattr(value, "size", 0) == 1
