"""metrics.jsonl on a disk that is full: what does not fit is kept, also over a rollback."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from runner.trackers.jsonl import Jsonl


class Full:
    """A file of a disk that takes `room` more bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room, self.name = file, room, file.name

    @property
    def closed(self) -> bool:
        return bool(self.file.closed)

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(data[: self.room])
        self.room -= written
        return int(written)

    def close(self) -> None:
        self.file.close()


def record(step: int) -> dict[str, Any]:
    return {"split": "train", "step": step, "loss": step / 3}


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("room", [0, 7, 60])
@pytest.mark.parametrize("back", [None, 3, 5])
def test_what_does_not_fit_is_written_later(tmp_path: Path, room: int, back: int | None) -> None:
    tracker, path = Jsonl(), tmp_path / "metrics.jsonl"
    tracker.start(tmp_path, 0, {})
    for step in (1, 2):
        tracker.log(record(step))
    tracker._file = Full(tracker._file, room)  # type: ignore[assignment]
    for step in (3, 4, 5, 6):
        tracker.log(record(step))
    if back is None:
        tracker._file.room = 1 << 20  # type: ignore[union-attr]
    else:
        tracker.rewind(back)
    first = 7 if back is None else back + 1
    for step in range(first, 9):
        tracker.log(record(step))
    tracker.close()
    assert steps(path) == list(range(1, 9))
    assert [child.name for child in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_going_on_drops_what_came_later_and_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record(step)) + "\n" for step in (1, 2, 3)) + '{"split": "tr')
    before = path.stat().st_ino
    tracker = Jsonl()
    tracker.start(tmp_path, 2, {})
    tracker.log(record(2))  # there already
    tracker.log(record(3))
    tracker.close()
    assert steps(path) == [1, 2, 3]
    assert path.stat().st_ino == before
