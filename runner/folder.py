"""A run's folder: its name, its files, and writing them so that a reader never sees half of one."""

from __future__ import annotations

import fcntl
import json
import math
import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from runner.errors import wrong

_HEARTBEAT = 1.0


class RunFolder:
    """The directory of one run.

    Args:
        path: the directory; made by `create`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state: dict[str, Any] = {}
        self._written = 0.0
        self._lock: TextIO | None = None

    @classmethod
    def new(cls, parent: Path, name: str) -> RunFolder:
        """Makes `parent`/DATE-TIME-NAME-xxxx, which did not exist before."""
        for _ in range(100):
            stamp = datetime.now().strftime("%Y-%m-%d-%H%M%S")
            path = parent / f"{stamp}-{_plain(name)}-{secrets.token_hex(2)}"
            try:
                parent.mkdir(parents=True, exist_ok=True)
                path.mkdir()
                return cls(path)
            except FileExistsError:
                continue
            except OSError as error:
                raise wrong(
                    "run_dir", f"cannot be made: {error.strerror or error}", _WRITABLE, value=str(path)
                ) from None
        raise wrong("run_dir", "no free name was found in 100 tries", "name one with run_dir=…", value=str(parent))

    @classmethod
    def named(cls, path: Path) -> RunFolder:
        """The folder that the user named, made if it is not there. Raises InputError where that cannot be."""
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise wrong(
                "run_dir", "is a file", "name a directory, or a path that is not there yet", value=str(path)
            ) from None
        except OSError as error:
            raise wrong("run_dir", f"cannot be made: {error.strerror or error}", _WRITABLE, value=str(path)) from None
        if not os.access(path, os.W_OK):
            raise wrong("run_dir", "is not writable", _WRITABLE, value=str(path))
        return cls(path)

    def lock(self) -> None:
        """Makes this process the only one that trains here, until it ends. Raises InputError where another does."""
        self._lock = (self.path / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self._lock.close()
            fix = "wait for it, or name another run_dir"
            raise wrong("run_dir", f"another process trains there ({holder})", fix, value=str(self.path)) from None
        self._lock.truncate(0)
        self._lock.write(
            f"host {socket.gethostname()}, process {os.getpid()}, since {datetime.now():%Y-%m-%d %H:%M:%S}"
        )
        self._lock.flush()

    def unlock(self) -> None:
        """Gives the folder free."""
        if self._lock is not None and not self._lock.closed:
            (self.path / ".lock").unlink(missing_ok=True)
            self._lock.close()

    def discard(self) -> None:
        """Removes a folder in which nothing has happened."""
        shutil.rmtree(self.path, ignore_errors=True)
        link = self.path.parent / "latest"
        if link.is_symlink() and not link.exists():
            link.unlink()

    def write_json(self, name: str, value: Any) -> None:
        """Replaces a JSON file atomically; numbers that are not finite are written as null."""
        self.write_text(name, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Replaces a text file atomically."""
        target = self.path / name
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)

    def read_json(self, name: str) -> Any:
        """The content of a JSON file, None where there is none or it is damaged."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def state(self, state: str, **more: Any) -> None:
        """Writes status.json: state, step, heartbeat, exit reason. What was said before stays unless said anew."""
        self._state.update(state=state, **more)
        self.heartbeat(always=True)

    def heartbeat(self, *, always: bool = False, **more: Any) -> None:
        """Renews status.json, at most once a second."""
        now = time.time()
        self._state.update(more)
        if always or now - self._written >= _HEARTBEAT:
            self._written = now
            self.write_json("status.json", {**self._state, "heartbeat": now, "pid": os.getpid()})

    def link_latest(self) -> None:
        """Points `latest` beside the folder to it; file systems without links do without."""
        link = self.path.parent / "latest"
        temporary = self.path.parent / f".latest.{os.getpid()}.{secrets.token_hex(2)}"
        try:
            temporary.symlink_to(self.path.name)
            temporary.replace(link)
        except OSError:
            temporary.unlink(missing_ok=True)


class Bystander(RunFolder):
    """A run's folder for the processes that leave its files to the first one."""

    def lock(self) -> None: ...

    def unlock(self) -> None: ...

    def discard(self) -> None: ...

    def write_text(self, name: str, text: str) -> None: ...

    def heartbeat(self, *, always: bool = False, **more: Any) -> None: ...

    def link_latest(self) -> None: ...


_WRITABLE = "give a path that you may write to"


def _plain(name: str) -> str:
    """The name as a part of a file name, of 80 bytes at most."""
    plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
    return plain.encode()[:80].decode(errors="ignore") or "run"


def finite(value: Any) -> Any:
    """The same nested value with numbers that JSON does not have (nan, inf) as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
