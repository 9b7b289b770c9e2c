"""metrics.jsonl: one JSON object a line, floats that read back exactly."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from runner.folder import finite

_log = logging.getLogger("runner")


class Jsonl:
    """Appends every record to RUN/metrics.jsonl at once; after a resume the file has each step once.

    What the disk does not take is kept, and tried again with the next record, at each checkpoint and at the end.
    """

    def __init__(self, file: str = "metrics.jsonl") -> None:
        self._name = file
        self._path = Path(file)
        self._file: BinaryIO | None = None
        #: What was not written yet, and whether the user knows.
        self._due, self._told = b"", False
        #: The step that is gone on from, and of which splits there is a record of it already.
        self._step, self._there = 0, set[Any]()
        # json.dumps with an option makes an encoder at every call.
        self._encode = json.JSONEncoder(allow_nan=False).encode

    def start(self, folder: Path, step: int, config: Mapping[str, Any]) -> None:
        self._path = folder / self._name
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Goes on after `step`: drops what was recorded later."""
        if self._file is not None:
            self._file.close()
        written = self._path.read_bytes() if self._path.exists() else b""
        data = written + self._due
        kept, self._there = _until(data, step)
        self._step, self._due = step, b""
        if data.startswith(kept):  # a disk that is full has no room for a copy
            self._due = kept[len(written) :]
            if len(kept) < len(written):
                os.truncate(self._path, len(kept))
        else:
            temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            temporary.write_bytes(kept)
            temporary.replace(self._path)
        self._file = self._path.open("ab", buffering=0)

    def log(self, record: Mapping[str, Any]) -> None:
        if self._there and record["step"] == self._step and record.get("split") in self._there:
            return  # an evaluation that was owed, made again
        try:
            line = self._encode(record)
        except ValueError:
            line = json.dumps(finite(record))
        self._due += line.encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        assert self._file is not None
        try:
            while self._due:
                self._due = self._due[self._file.write(self._due) :]
            self._told = False
        except OSError as error:
            if not self._told:
                _log.warning("%s cannot be written, and is tried again: %s", self._file.name, error.strerror)
            self._told = True

    def close(self) -> None:
        if self._file is not None and not self._file.closed:
            self.flush()
            if self._due:
                _log.warning("%s lacks its last records: %s", self._file.name, self._due.count(b"\n"))
            self._file.close()


def _until(data: bytes, step: int) -> tuple[bytes, set[Any]]:
    """The records up to those of `step`, without what is no record: a last line that a crash cut off.

    And the splits that have a record of `step` itself.
    """
    kept, there = [], set()
    for line in data.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step:
            kept.append(line + b"\n")
            if record["step"] == step:
                there.add(record.get("split"))
    return b"".join(kept), there
