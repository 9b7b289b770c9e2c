"""Files and folders that are on the disk when the call returns."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from xxhash import xxh3_128

#: Bytes written at once, and those copied and hashed at once: these are still in the processor's cache when hashed.
_WRITTEN, _COPIED = 1 << 22, 1 << 19
#: What a file system answers that cannot write this past the page cache.
_NOT_SO = (errno.EINVAL, errno.EOPNOTSUPP)


class Written:
    """A file that is being written, with the size and the hash of what has gone into it so far.

    It is written past the page cache where the system can, which takes whole pages from memory that begins with one.
    A checkpoint is seldom read soon, and the cache costs more than the writing: the pages for it, a copy into them on
    the processors that the training uses, and what other programs had there. What does not fill the memory at the end
    goes through the cache, and so does everything where the file system knows no other way.
    """

    def __init__(self, raw: FileIO) -> None:
        self._raw = raw
        self._hash = xxh3_128()
        # Shared, so that a fork (a data worker's) while the disk reads it does not give it other pages.
        self._memory = mmap.mmap(-1, _WRITTEN, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        self._may_bypass = True
        self._filled = 0
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        self.size += len(rest)
        while rest:
            start, part = self._filled, rest[: min(_COPIED, len(self._memory) - self._filled)]
            _copy(self._memory, start, part)
            self._filled += len(part)
            # What is hashed is what will be written, whatever happens to the original meanwhile.
            self._hash.update(memoryview(self._memory)[start : self._filled])
            rest = rest[len(part) :]
            if self._filled == len(self._memory):
                self._put(past_the_cache=self._may_bypass)

    def sync(self) -> None:
        """Everything is on the disk after this."""
        self._put(past_the_cache=False)
        os.fsync(self._raw.fileno())

    @property
    def hash(self) -> str:
        return self._hash.hexdigest()

    def _put(self, past_the_cache: bool) -> None:
        rest, self._filled = memoryview(self._memory)[: self._filled], 0
        _bypass(self._raw.fileno(), past_the_cache)
        while rest:
            try:
                # A single system call may take less than it is given.
                rest = rest[self._out(rest) :]
            except OSError as error:
                if error.errno not in _NOT_SO or not past_the_cache:
                    raise
                # The file system does not mean it, or took a part and the rest is not aligned; the cache takes any.
                past_the_cache = False
                self._may_bypass = len(rest) < len(self._memory)
                _bypass(self._raw.fileno(), False)

    def _out(self, data: memoryview) -> int:
        """One system call; returns how many bytes it took."""
        return self._raw.write(data)


def _bypass(handle: int, wanted: bool) -> None:
    """Lets a file be written past the page cache, or through it; a file system that cannot stays as it is."""
    flag = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    if bool(flags & flag) != wanted:
        with suppress(OSError):
            fcntl.fcntl(handle, fcntl.F_SETFL, flags ^ flag)


def _copy(memory: mmap.mmap, start: int, data: memoryview) -> None:
    if data.readonly:
        memory[start : start + len(data)] = data
    else:
        # Lets other threads run meanwhile.
        source = ctypes.c_char.from_buffer(data)
        target = ctypes.c_char.from_buffer(memory, start)
        ctypes.memmove(ctypes.addressof(target), ctypes.addressof(source), len(data))


@contextmanager
def synced_file(path: Path) -> Iterator[Written]:
    """A new file to write into; an existing one is an error, for nothing is ever written in place."""
    with open(path, "xb", buffering=0) as raw:
        written = Written(raw)
        yield written
        written.sync()


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable: a renamed file is not, until its folder is synced."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
