"""The folder of the user where downloads and tokens are kept, and the lock that has them made once."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("runner")


def folder(kind: str) -> Path:
    """`runner/KIND` below $XDG_CACHE_HOME or ~/.cache (a relative XDG_CACHE_HOME counts as not set, as XDG says)."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "runner" / kind


@contextmanager
def only_one(path: Path) -> Iterator[Path]:
    """One process at a time makes `path`; yields an empty folder beside it, on the same disk, for what is not done yet.

    Whoever waited must look again whether `path` is there now. What killed processes left behind is removed.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".tmp-{path.name}-"
    lock = FileLock(path.parent / f".{path.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that is making %s", path)
        lock.acquire()
    try:
        for left_over in path.parent.glob(f"{prefix}*"):
            shutil.rmtree(left_over, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent, ignore_cleanup_errors=True) as work:
            yield Path(work)
    finally:
        lock.release()


def publish(finished: Path, path: Path) -> None:
    """Puts a finished file or folder in its place by renaming, so that nobody sees half of it."""
    if path.is_dir():
        path.rename(finished.parent / f"old-{path.name}")
    finished.replace(path)
