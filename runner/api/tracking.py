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

_KNOWN = {"jsonl": Jsonl, "tensorboard": TensorBoard}


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


class Tracking:
    """The trackers of one run; only the main process has any."""

    def __init__(self, wanted: Any, folder: Path, config: Mapping[str, Any], *, main: bool) -> None:
        self.by_name = build_trackers(wanted)
        self._trackers = Trackers(self.by_name if main else {})
        self._calls = 0
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            self._trackers.start(folder, 0, dict(config))

    def log(self, values: Mapping[str, Any], step: int | None, split: str) -> None:
        self._calls += 1
        plain = {name: value.item() if _is_number(value) else value for name, value in values.items()}
        self._trackers.log({"split": split, "step": self._calls if step is None else int(step), **plain})

    def close(self) -> None:
        self._trackers.close()


def _is_number(value: Any) -> bool:
    """A tensor or array of one element."""
    if isinstance(value, Tensor):
        return value.numel() == 1
    return hasattr(value, "item") and getattr(value, "size", 0) == 1
