"""Why a checkpoint could not be saved, in one sentence, the same on every process."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import RunnerError


class SaveFailed(RunnerError):
    """A checkpoint was not saved; what was there before stays as it was.

    `needed` are the bytes that it takes, `free` those that the file system says it has (None: not known), `errno`
    the system's number for the error where it is one of the system's.
    """

    def __init__(self, path: Path, why: str, needed: int | None, free: int | None, errno: int | None) -> None:
        self.path, self.why, self.needed, self.free, self.errno = path, why, needed, free, errno
        sizes = [] if needed is None else [f"it takes {needed:,} bytes"]
        sizes += [] if free is None else [f"{free:,} are free"]
        known = f" ({', '.join(sizes)})" if sizes else ""
        super().__init__(f"{path} could not be saved: {why}{known}")

    def __reduce__(self) -> Any:
        return SaveFailed, (self.path, self.why, self.needed, self.free, self.errno)


@dataclass(frozen=True)
class Failure:
    """An error as it travels between processes, which know only words of each other."""

    why: str
    errno: int | None = None
    needed: int | None = None
    free: int | None = None

    @classmethod
    def of(cls, error: BaseException, rank: int = 0, world: int = 1) -> Failure:
        where = f"rank {rank}: " if world > 1 else ""
        if isinstance(error, OSError) and error.errno is not None:
            about = f", {error.filename}" if error.filename else ""
            return cls(f"{where}{error.strerror or os.strerror(error.errno)}{about}", error.errno)
        return cls(f"{where}{error if isinstance(error, RunnerError) else f'{type(error).__name__}: {error}'}")


def first(results: Iterable[Any]) -> Failure | None:
    """The failure of the lowest rank."""
    return next((result for result in results if isinstance(result, Failure)), None)


def free_bytes(folder: Path) -> int | None:
    """What the file system says that this process may still write; None where it does not say."""
    for place in (folder, *folder.parents):
        try:
            found = os.statvfs(place)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        if not found.f_blocks:
            return None
        blocks = found.f_bfree if os.geteuid() == 0 else found.f_bavail
        return blocks * found.f_frsize
    return None
