"""Files that are on the disk when the call returns, written past the page cache where the system can."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from io import FileIO
from pathlib import Path

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


def test_what_is_hashed_is_what_is_written(tmp_path: Path) -> None:
    """Also where the original changes after the call."""
    source = bytearray(b"a" * (5 * MIB))
    with synced_file(tmp_path / "file") as file:
        file.write(memoryview(source))
        source[:] = b"b" * len(source)
    assert (tmp_path / "file").read_bytes() == b"a" * (5 * MIB)
    assert file.hash == xxh3_128_hexdigest(b"a" * (5 * MIB))


def test_nothing_is_written_in_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("there")
    with pytest.raises(FileExistsError), synced_file(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_text() == "there"


class Recorded(FileIO):
    """Notes which writes went past the cache; `refuses` those whose memory is not aligned as it wishes."""

    def __init__(self, path: Path, refuses: bool = False, takes: int | None = None) -> None:
        super().__init__(path, "xb")
        self.refuses, self.takes = refuses, takes
        self.seen: list[tuple[bool, int]] = []

    def write(self, data: memoryview) -> int:  # type: ignore[override]
        direct = bool(fcntl.fcntl(self.fileno(), fcntl.F_GETFL) & os.O_DIRECT)
        if direct and self.refuses:
            raise OSError(errno.EINVAL, "Invalid argument")
        self.seen.append((direct, len(data)))
        return super().write(data[: self.takes]) or 0


def _supported(folder: Path) -> bool:
    with open(folder / "probe", "xb") as file:
        synced._bypass(file.fileno(), True)
        return bool(fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_DIRECT)


def _written(file: Recorded, data: bytes) -> None:
    with file:
        written = Written(file)
        written.write(data)
        written.sync()


def test_whole_pieces_go_past_the_cache(tmp_path: Path) -> None:
    if not _supported(tmp_path):
        pytest.skip("the file system of the temporary folder knows no O_DIRECT")
    file, data = Recorded(tmp_path / "file"), random.Random(0).randbytes(8 * MIB + 5)
    _written(file, data)
    assert file.seen == [(True, 4 * MIB), (True, 4 * MIB), (False, 5)]
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize(("refuses", "takes"), [(True, None), (False, 4097), (True, 1000)])
def test_a_system_that_takes_less_or_refuses_gets_it_through_the_cache(
    tmp_path: Path, refuses: bool, takes: int | None
) -> None:
    """A part of a piece leaves a rest that no disk takes directly; it is written all the same."""
    size = 4 * MIB + 5 if takes is None else 4 * MIB
    data = random.Random(1).randbytes(size)
    _written(Recorded(tmp_path / "file", refuses, takes), data)
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
