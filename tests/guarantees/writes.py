"""Watches what processes do to checkpoints that are there, and when they let them go; also as a hook of a run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from runner.train.hook import Hook

_CHANGES = (
    "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.link", "os.symlink",
    "os.setxattr", "os.removexattr", "shutil.rmtree",
)  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Writes:
    """Hears what this process does below a folder of checkpoints of which two are kept.

    Each thing goes as a line into the file `log`: a `violation`, the name of what was `published`, `exchanged`, or is
    `gone`.
    """

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = Path(os.path.abspath(folder)), log.absolute()

    def watch(self) -> None:
        sys.addaudithook(self._hear)

    def _say(self, **line: str) -> None:
        with self.log.open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")

    def _inside(self, path: Any) -> tuple[str, ...]:
        """The parts of a path from a checkpoint's folder on; none where it leads into no checkpoint."""
        if not isinstance(path, str | bytes | os.PathLike):
            return ()
        full = Path(os.path.abspath(os.fsdecode(path)))
        words = full.relative_to(self.folder).parts if full.is_relative_to(self.folder) else ()
        return words if words and words[0].startswith("step_") else ()

    def _hear(self, name: str, arguments: Any) -> None:
        if name == "open":
            path, _mode, flags = arguments
            if isinstance(flags, int) and flags & _WRITES and self._inside(path):
                self._say(violation=f"open {os.fsdecode(path)} to write")
        elif name in ("os.rename", "runner.exchange"):
            self._renamed(name, Path(os.fsdecode(arguments[0])), Path(os.fsdecode(arguments[1])))
        elif name in _CHANGES and any(self._inside(argument) for argument in arguments[:2]):
            self._say(violation=f"{name} {arguments}")

    def _renamed(self, name: str, source: Path, target: Path) -> None:
        goes, comes = self._inside(source), self._inside(target)
        if goes and (len(goes) > 1 or not target.name.startswith((".trash-", ".old-"))):
            self._say(violation=f"rename {source} to {target}")
        if goes:
            self._goes(source, target)
        if not comes:
            return
        if len(comes) > 1 or not source.name.startswith(".tmp-") or not (source / "manifest.json").exists():
            self._say(violation=f"{name} of {source} and {target}")
        for holder in holders(source):
            self._say(violation=f"{target} appears while it can be written to: {holder}")
        self._say(**{"exchanged" if name == "runner.exchange" else "published": target.name})

    def _goes(self, source: Path, target: Path) -> None:
        left = [path for path in self.folder.iterdir() if path.name.startswith("step_")]
        newer = [path.name for path in left if path.name >= source.name and (path / "manifest.json").exists()]
        # Itself, and two that stay.
        if target.name.startswith(".trash-") and len(newer) < 3:
            self._say(violation=f"{source} goes while only {newer} are newer")
        self._say(gone=source.name)


def holders(folder: Path) -> list[str]:
    """The files of a folder that this process, or one of the same parent, has open for writing or mapped to write."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) != os.getppid():
                continue
            for line in (entry / "maps").read_text().splitlines():
                if f"{folder}/" in line and line.split()[1][1] == "w" and line.split()[1][3] == "s":
                    found.append(f"{entry.name} maps {line}")
            handles = list((entry / "fd").iterdir())
        except OSError:
            continue  # it has ended
        for handle in handles:
            try:
                path = os.readlink(handle)
                flags = int((entry / "fdinfo" / handle.name).read_text().partition("flags:")[2].split()[0], 8)
            except OSError:
                continue
            if Path(path).is_relative_to(folder) and flags & os.O_ACCMODE != os.O_RDONLY:
                found.append(f"{entry.name} has {path} open")
    return found


class Trace(Hook):
    """Watches from before anything is saved, in each process of a run."""

    def __init__(self, folder: str, log: str) -> None:
        Writes(Path(folder), Path(log)).watch()


def told(log: Path) -> dict[str, list[str]]:
    """What was heard, by kind."""
    found: dict[str, list[str]] = {"violation": [], "published": [], "exchanged": [], "gone": []}
    for line in log.read_text().splitlines() if log.exists() else ():
        for kind, what in json.loads(line).items():
            found[kind].append(what)
    return found
