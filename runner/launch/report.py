"""Where the processes of one computer leave word for their parent: files in memory, which go with the last of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

#: In the report: the plan, a signal that came before a process could hear it, the run's folder.
PLAN, SIGNAL, RUN = "plan.json", "signal", "run.json"
#: What each process leaves: its output, why it failed, its signs of life, its stacks.
OUTPUT, FAILURE, BEAT, STACKS = "out", "json", "beat", "stacks"

_MEMORY = "memory:"


def file_of(rank: int, what: str) -> str:
    return f"rank_{rank}.{what}"


class Report:
    """A set of files that a parent and its processes share: a folder, or files without a folder.

    A parent that is killed cannot remove a folder. So where the system has files in memory (Linux), the parent opens
    them all before it starts its processes, and they find them as those that the parent has open.

    Args:
        where: a folder, or what `name` says of files in memory.
    """

    def __init__(self, where: str | Path) -> None:
        self.name = str(where)
        self._folder: Path | None = None
        self._files: dict[str, str] = {}
        self._parent = 0
        if not self.name.startswith(_MEMORY):
            self._folder = Path(where)
            return
        parent, _, files = self.name.removeprefix(_MEMORY).partition(":")
        self._parent = int(parent)
        self._files = dict(pair.split("=") for pair in files.split(",") if pair)

    @classmethod
    def in_memory(cls, nproc: int) -> Report | None:
        """Files for `nproc` processes of this one; None where the system has none."""
        if not hasattr(os, "memfd_create") or not Path("/proc/self/fd").is_dir():
            return None
        ranks = [file_of(rank, what) for rank in range(nproc) for what in (OUTPUT, FAILURE, BEAT, STACKS)]
        try:
            pairs = [f"{name}={os.memfd_create(f'runner-{name}')}" for name in (PLAN, SIGNAL, RUN, *ranks)]
        except OSError:
            return None  # too many files, or not allowed
        return cls(f"{_MEMORY}{os.getpid()}:{','.join(pairs)}")

    def path(self, name: str) -> Path:
        """By which any process may open the file."""
        if self._folder is not None:
            return self._folder / name
        return Path(f"/proc/{self._parent}/fd/{self._files[name]}")

    def read(self, name: str) -> str:
        """The content of a file; nothing where there is none."""
        try:
            return self.path(name).read_text(encoding="utf-8", errors="replace")
        except (OSError, KeyError):
            return ""

    def write(self, name: str, text: str) -> None:
        """Writes a file: in a folder whole or not at all."""
        path = self.path(name)
        if self._folder is None:
            path.write_text(text, encoding="utf-8")
            return
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)

    def matching(self, pattern: str) -> Iterator[str]:
        """The names of the files that are like a pattern."""
        if self._folder is not None:
            yield from sorted(path.name for path in self._folder.glob(pattern))
        else:
            yield from (name for name in self._files if fnmatch(name, pattern))

    def clear(self, rank: int) -> None:
        """Forgets what an earlier attempt of a process has left."""
        for what in (FAILURE, "code"):
            with suppress(OSError, KeyError):
                if self._folder is not None:
                    self.path(file_of(rank, what)).unlink(missing_ok=True)

    def close(self) -> None:
        """Gives the memory free; for the parent."""
        for descriptor in self._files.values():
            with suppress(OSError):
                os.close(int(descriptor))
        self._files = {}
