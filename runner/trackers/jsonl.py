"""metrics.jsonl: one JSON object a line, floats that read back exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from runner.folder import finite


class Jsonl:
    """Appends every record to RUN/metrics.jsonl and flushes it; after a resume the file has each step once."""

    def __init__(self, file: str = "metrics.jsonl") -> None:
        self._name = file
        self._file: TextIO | None = None
        #: The step that is gone on from, and of which splits there is a record of it already.
        self._step, self._there = 0, set[Any]()
        # json.dumps with an option makes an encoder at every call.
        self._encode = json.JSONEncoder(allow_nan=False).encode

    def start(self, folder: Path, step: int, config: Mapping[str, Any]) -> None:
        path = folder / self._name
        self._step, self._there = step, _forget_after(path, step) if path.exists() else set()
        self._file = path.open("a", encoding="utf-8")

    def log(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None
        if self._there and record["step"] == self._step and record.get("split") in self._there:
            return  # an evaluation that was owed, made again
        try:
            line = self._encode(record)
        except ValueError:
            line = json.dumps(finite(record))
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _forget_after(path: Path, step: int) -> set[Any]:
    """Drops the records of steps after `step`, and what is no record: a last line that a crash cut off.

    Returns the splits that have a record of `step` itself.
    """
    kept, there = [], set()
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step:
            kept.append(line + b"\n")
            if record["step"] == step:
                there.add(record.get("split"))
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(b"".join(kept))
    temporary.replace(path)
    return there
