"""Where the processes of one computer leave word for their parent: files in memory, which go with the last of them."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from runner.errors import RunnerError

#: In the report: the plan, a signal that came before a process could hear it, the run's folder.
PLAN, SIGNAL, RUN = "plan.json", "signal", "run.json"
#: What each process leaves: its output, why it failed, its signs of life, its stacks.
OUTPUT, FAILURE, BEAT, STACKS = "out", "json", "beat", "stacks"

_MEMORY = "memory:"
#: Files that a parent has open beside these, and one for each of its processes.
_OTHERS = 16


def files_allowed() -> float:
    """How many files this process may have open (`ulimit -n`)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return float("inf") if soft == resource.RLIM_INFINITY else soft


def file_of(rank: int, what: str) -> str:
    return f"rank_{rank}.{what}"


@contextmanager
def temporary() -> Iterator[str]:
    """A folder for a report, which goes away again. Raises RunnerError where there is no place for one."""
    try:
        made = tempfile.TemporaryDirectory(prefix="runner-", ignore_cleanup_errors=True)
    except OSError as error:
        raise RunnerError(f"no folder can be made for what the processes tell their parent: {error}") from error
    with made as folder:
        yield folder


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
        names = (PLAN, SIGNAL, RUN, *ranks)
        if len(names) + nproc + _OTHERS > files_allowed():
            return None  # the parent needs some to start its processes
        made: dict[str, int] = {}
        try:
            for name in names:
                made[name] = os.memfd_create(f"runner-{name}")
        except OSError:  # not allowed, or no more files
            for descriptor in made.values():
                os.close(descriptor)
            return None
        return cls(f"{_MEMORY}{os.getpid()}:{','.join(f'{name}={made[name]}' for name in made)}")

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
