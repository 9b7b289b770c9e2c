"""A run's folder: its name, its files, and writing them so that a reader never sees half of one."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO, cast

from runner.errors import InputError, wrong

log = logging.getLogger("runner")

_HEARTBEAT = 1.0
#: Seconds to wait for a lock: what a killed process has started, ends a moment after it.
_PATIENCE = 0.7


class RunFolder:
    """The directory of one run.

    Args:
        path: the directory, which is there.
        made: whether it was made for this run, and is the run's with all that is in it.
    """

    def __init__(self, path: Path, *, made: bool = False) -> None:
        self.path = path
        self._made = made
        self._state: dict[str, Any] = {}
        self._written = 0.0
        #: Whether status.json could not be written the last time.
        self._silent = False
        #: Lines by the file that could not take them yet.
        self._due: dict[str, bytes] = {}
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
                return cls(path, made=True)
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
        there = os.path.isdir(path)  # False also for what is no name
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
        return cls(path, made=not there)

    def lock(self) -> None:
        """Makes this process the only one that trains here, until it ends. Raises InputError where another does."""
        if self._lock is not None and not self._lock.closed:
            return
        until = time.monotonic() + _PATIENCE
        while (lock := self._taken("a+", fcntl.LOCK_EX)) is None:
            if time.monotonic() > until:
                raise self._locked()
            time.sleep(0.02)
        self._lock = lock
        holder = f"host {socket.gethostname()}, process {os.getpid()}, since {datetime.now():%Y-%m-%d %H:%M:%S}"
        with suppress(OSError):  # a full disk: it is locked all the same
            lock.truncate(0)
            os.write(lock.fileno(), holder.encode())
        self._sweep()

    def _sweep(self) -> None:
        """Removes what a killed process has left of files that were being replaced."""
        for path in self.path.glob(".*.*.[0-9]*"):
            with suppress(OSError):
                path.unlink()

    def begin(self) -> None:
        """Locks a folder in which nothing has happened yet, and says that a run starts there: it is no other's now."""
        self.lock()
        self._state.update(state="starting", step=0)
        try:
            self._write_status()
        except OSError as error:
            self.discard()
            why = f"cannot be written: {error.strerror or error}"
            raise wrong("run_dir", why, _WRITABLE, value=str(self.path)) from None

    def check_free(self) -> None:
        """Raises InputError where another process trains here: before anything else is done for a run.

        And for a path at which nothing can be, such as one that is too long.
        """
        until = time.monotonic() + _PATIENCE
        while self._is_locked():
            lock = self._taken("r+", fcntl.LOCK_SH)
            if lock is not None:
                lock.close()
                return
            if time.monotonic() > until:
                raise self._locked()
            time.sleep(0.02)

    def _is_locked(self) -> bool:
        try:
            return (self.path / ".lock").exists()
        except OSError as error:
            why = f"cannot be made: {error.strerror or error}"
            raise wrong("run_dir", why, _WRITABLE, value=str(self.path)) from None

    def _taken(self, mode: str, kind: int) -> TextIO | None:
        """The lock, or None where somebody else has it.

        The system gives a lock free when its holder dies, however that happens. A holder that ends in order removes
        the file: so what was locked must still be the file of that name, or two could hold a lock each.
        """
        path = self.path / ".lock"
        try:
            lock = cast(TextIO, path.open(mode, encoding="utf-8"))
        except FileNotFoundError:
            if mode == "a+":  # the folder was discarded meanwhile
                self.path.mkdir(parents=True, exist_ok=True)
            return None
        except OSError as error:
            why = f"is not writable: {error.strerror or error}"
            raise wrong("run_dir", why, _WRITABLE, value=str(self.path)) from None
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                return lock  # a file system without locks
        lock.close()
        return None

    def _locked(self) -> InputError:
        try:
            holder = (self.path / ".lock").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            holder = ""
        why = f"another process trains there ({holder or 'unknown'})"
        return wrong("run_dir", why, "wait for it, or name another run_dir", value=str(self.path))

    def unlock(self) -> None:
        """Gives the folder free."""
        if self._lock is not None and not self._lock.closed:
            (self.path / ".lock").unlink(missing_ok=True)
            self._lock.close()

    def discard(self) -> None:
        """Removes a folder in which nothing has happened; of one that was there, what this run has put into it.

        A user's hidden files may be in it: only such a folder counts as empty.
        """
        ours = [self.path]
        if not self._made:
            there = self.path.iterdir() if self.path.is_dir() else ()
            ours = [child for child in there if child.name == ".lock" or not child.name.startswith(".")]
        for path in ours:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()
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
        try:
            # Names that the locale could not read come as surrogates, and go back to the bytes that they were.
            temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
            temporary.replace(target)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise

    def append_line(self, name: str, line: str) -> None:
        """Adds a line to a text file, in one piece and for good.

        Where the disk does not take it, that is a warning; it is kept, and tried again whenever status.json is written.
        """
        self._due[name] = self._due.get(name, b"") + line.encode() + b"\n"
        try:
            self._append()
        except OSError as error:
            log.warning("%s cannot be written, and is tried again: %s", self.path / name, error.strerror)

    def _append(self) -> None:
        for name, lines in list(self._due.items()):
            descriptor = os.open(self.path / name, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                size = os.fstat(descriptor).st_size
                cut_off = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # by a crash
                whole = b"\n" * cut_off + lines
                if os.write(descriptor, whole) < len(whole):
                    os.ftruncate(descriptor, size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                del self._due[name]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

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
        """Renews status.json, at most once a second. Where the disk does not take it, that is one warning."""
        now = time.time()
        self._state.update(more)
        if not always and now - self._written < _HEARTBEAT:
            return
        self._written = now
        try:
            self._write_status()
            self._silent = False
            with suppress(OSError):
                self._append()
        except OSError as error:
            # What the run is for are its checkpoints, which say themselves what they lack.
            if not self._silent:
                log.warning("%s cannot be written, and stays as it was: %s", self.path / "status.json", error.strerror)
            self._silent = True

    def _write_status(self) -> None:
        self.write_json("status.json", {**self._state, "heartbeat": time.time(), "pid": os.getpid()})

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

    def append_line(self, name: str, line: str) -> None: ...

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
