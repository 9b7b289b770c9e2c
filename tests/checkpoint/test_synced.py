"""Files that are on the disk when the call returns, written past the page cache where the system can."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128_hexdigest

from runner.checkpoint import synced
from runner.checkpoint.synced import Written, synced_file

MIB = 1 << 20


@pytest.mark.parametrize("size", [0, 1, 4096, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1, 9 * MIB + 4097])
@pytest.mark.parametrize("writable", [False, True])
def test_a_file_holds_what_was_written(tmp_path: Path, size: int, writable: bool) -> None:
    """In words of odd lengths, from memory that may be written to (tensors) and that may not (JSON)."""
    draw = random.Random(size)
    data = draw.randbytes(size)
    source = bytearray(data) if writable else data
    with synced_file(tmp_path / "file") as file:
        start = 0
        while start < size:
            end = start + draw.choice([1, 8, 4095, MIB + 3, 5 * MIB])
            file.write(memoryview(source)[start:end])
            start = end
    assert (tmp_path / "file").read_bytes() == data
    assert (file.size, file.hash) == (size, xxh3_128_hexdigest(data))


def test_what_is_hashed_is_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the original changes meanwhile."""
    source = bytearray(b"a" * (5 * MIB))
    copy = synced._copy

    def copied(*arguments: Any) -> None:
        copy(*arguments)
        source[:] = b"b" * len(source)

    monkeypatch.setattr(synced, "_copy", copied)
    with synced_file(tmp_path / "file") as file:
        file.write(memoryview(source))
    found = (tmp_path / "file").read_bytes()
    assert set(found) == {*b"ab"}
    assert file.hash == xxh3_128_hexdigest(found)


def test_nothing_is_written_in_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("there")
    with pytest.raises(FileExistsError), synced_file(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_text() == "there"


class Recorded(FileIO):
    """Notes which writes went past the cache (True), and how many bytes each was given.

    Such a write is answered with the error `refuses`, or takes only the first `takes` bytes and then no rest of a
    piece, as a disk whose blocks the rest does not begin with.
    """

    def __init__(self, path: Path, refuses: int | None = None, takes: int | None = None) -> None:
        super().__init__(path, "xb")
        self.refuses, self.takes = refuses, takes
        self.seen: list[tuple[bool, int]] = []

    def write(self, data: memoryview) -> int:  # type: ignore[override]
        direct = _direct(self.fileno())
        self.seen.append((direct, len(data)))
        if direct and self.refuses is not None:
            raise OSError(self.refuses, os.strerror(self.refuses))
        if direct and self.takes is not None:
            if len(data) < 4 * MIB:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            synced._bypass(self.fileno(), False)
            taken = super().write(data[: self.takes])
            synced._bypass(self.fileno(), True)
            return taken
        return super().write(data)


def _direct(handle: int) -> bool:
    return bool(fcntl.fcntl(handle, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


@pytest.fixture
def direct(tmp_path: Path) -> None:
    with open(tmp_path / "probe", "xb") as file:
        synced._bypass(file.fileno(), True)
        if not _direct(file.fileno()):
            pytest.skip("the file system of the temporary folder knows no O_DIRECT")


def _written(file: Recorded, data: bytes) -> None:
    with file:
        written = Written(file)
        written.write(data)
        written.sync()


def test_whole_pieces_go_past_the_cache(tmp_path: Path, direct: None) -> None:
    file, data = Recorded(tmp_path / "file"), random.Random(0).randbytes(8 * MIB + 5)
    _written(file, data)
    assert file.seen == [(True, 4 * MIB), (True, 4 * MIB), (False, 5)]
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("refuses", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_does_not_mean_it_is_asked_once(tmp_path: Path, direct: None, refuses: int) -> None:
    file, data = Recorded(tmp_path / "file", refuses=refuses), random.Random(1).randbytes(12 * MIB)
    _written(file, data)
    assert file.seen == [(True, 4 * MIB), *[(False, 4 * MIB)] * 3]
    assert (tmp_path / "file").read_bytes() == data


def test_the_rest_of_a_piece_that_was_taken_in_part_goes_through_the_cache(tmp_path: Path, direct: None) -> None:
    """It begins where no block does; the next piece begins with one again."""
    file, data = Recorded(tmp_path / "file", takes=4097), random.Random(2).randbytes(8 * MIB)
    _written(file, data)
    rest = 4 * MIB - 4097
    assert file.seen == [(True, 4 * MIB), (True, rest), (False, rest)] * 2
    assert (tmp_path / "file").read_bytes() == data


def test_a_full_disk_is_no_reason_to_try_again(tmp_path: Path) -> None:
    """Any other error is the caller's."""

    class Full(FileIO):
        calls = 0

        def write(self, data: memoryview) -> int:  # type: ignore[override]
            self.calls += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Full(tmp_path / "file", "xb") as file, pytest.raises(OSError, match="No space") as seen:
        Written(file).write(bytes(4 * MIB))
    assert (seen.value.errno, file.calls) == (errno.ENOSPC, 1)
