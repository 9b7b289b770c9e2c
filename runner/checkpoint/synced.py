"""Files and folders that are on the disk when the call returns."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from xxhash import xxh3_128

#: Bytes hashed and written at once: few enough to be still in the processor's cache when they are written.
_PIECE = 1 << 22


class Written:
    """A file that is being written, with the size and the hash of what has gone into it so far."""

    def __init__(self, raw: FileIO) -> None:
        self._raw = raw
        self._hash = xxh3_128()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            self._hash.update(piece)
            while piece:
                # A single system call may take less than it is given.
                piece = piece[self._raw.write(piece) :]
        self.size += len(view)

    @property
    def hash(self) -> str:
        return self._hash.hexdigest()


@contextmanager
def synced_file(path: Path) -> Iterator[Written]:
    """A new file to write into; an existing one is an error, for nothing is ever written in place."""
    with open(path, "xb", buffering=0) as raw:
        yield Written(raw)
        os.fsync(raw.fileno())


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable: a renamed file is not, until its folder is synced."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
