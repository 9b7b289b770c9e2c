"""The folder of a run's checkpoints: what counts as one, how one appears, and how one goes.

A checkpoint is a folder `step_00000100` with a readable manifest and all its files. It appears by one rename and is
never written in place; one that goes is renamed before it is removed. So there is no moment at which a reader sees
a part of one, and what a killed process leaves has a name that no reader takes.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from runner.checkpoint import manifest
from runner.checkpoint.manifest import Damaged, Manifest
from runner.checkpoint.synced import sync_folder
from runner.checkpoint.verify import verify
from runner.errors import InputError, RunnerError, wrong

log = logging.getLogger(__name__)

_STEP = re.compile(r"step_([0-9]+)")
_STAGING, _TRASH, _REPLACED = ".tmp-", ".trash-", ".old-"
#: What a killed process may leave, by the names that are given here: a user's folder may hold others like them.
_LEFTOVER = re.compile(r"\.(?:old-step_[0-9]+|(?:tmp-|trash-(?:tmp-|old-)?)step_[0-9]+-[^/]*)")
_LEFT = "left-"


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def candidates(folder: Path) -> list[Path]:
    """The folders that are named like a checkpoint, by rising step; anything else in there is nobody's business."""
    if not folder.is_dir():
        return []
    found = [
        child for child in folder.iterdir() if _STEP.fullmatch(child.name) and child.is_dir() and not child.is_symlink()
    ]
    return sorted(found, key=lambda path: (step_of(path), path.name))


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, passing over damaged ones with a warning; None where there never was one.

    Raises RunnerError where there are checkpoints and none is complete: a silent fresh start would hide it. Raises
    InputError where the newest was written by a newer version of the program. All files are read: what is taken has
    the hashes that it was written with.
    """
    bring_back(folder)
    found = candidates(folder)
    for path in reversed(found):
        try:
            verify(path, Manifest.read(path))
        except Damaged as error:
            log.warning("%s; taking the one before", error)
        else:
            return path
    if found:
        raise RunnerError(f"none of the {len(found)} checkpoints in {folder} is complete; move them away to start anew")
    return None


def find(path: Path, key: str = "resume") -> Path:
    """The checkpoint that a path names: a checkpoint's folder, or a run's or its `checkpoints/`, then the latest.

    Raises InputError (with `key`) where there is none, or where the named one is damaged.
    """
    fix = "give the folder of a checkpoint (…/checkpoints/step_00000100) or of a run"
    if not os.path.isdir(path):  # False also for what is no name
        why = "is not a folder" if os.path.exists(path) else "does not exist"
        raise wrong(key, f"{path} {why}", fix, value=str(path))
    if (path / manifest.NAME).exists() or _STEP.fullmatch(path.name):
        try:
            verify(path, Manifest.read(path))
        except Damaged as error:
            raise wrong(
                key, str(error), "name another checkpoint, or the run for its latest", value=str(path)
            ) from error
        return path
    inner = path / "checkpoints"
    try:
        found = latest(inner if inner.is_dir() else path)
    except InputError:
        raise
    except RunnerError as error:
        raise wrong(key, str(error), fix, value=str(path)) from error
    if found is None:
        raise wrong(key, f"{path} holds no checkpoint", fix, value=str(path))
    return found


def begin(path: Path) -> Path:
    """An empty staging folder for the checkpoint `path`, whose folder must be there."""
    staging = path.with_name(f"{_STAGING}{path.name}-{secrets.token_hex(4)}")
    staging.mkdir()
    return staging


def discard(staging: Path) -> None:
    """Removes a staging folder as far as that is possible; what stays is swept at the next start."""
    shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, path: Path) -> None:
    """Makes a staging folder, whose files are all written and synced, the checkpoint `path`; replaces one of it.

    Raises OSError where that does not last; what was there before, or nothing, has the name again then.
    """
    if not path.exists():
        staging.rename(path)
        with _or_back(lambda: path.rename(staging)):
            sync_folder(path.parent)
        return
    replaced = staging
    if exchange(staging, path):
        with _or_back(lambda: exchange(staging, path)):
            sync_folder(path.parent)
    else:
        # It comes back in `bring_back` if the process dies between the two renames.
        replaced = path.with_name(f"{_REPLACED}{path.name}")
        path.rename(replaced)
        with _or_back(lambda: replaced.rename(path)):
            staging.rename(path)
            with _or_back(lambda: path.rename(staging)):
                sync_folder(path.parent)
    with suppress(OSError):  # the new one counts; what cannot be renamed now is swept later
        remove(replaced)


@contextmanager
def _or_back(undo: Callable[[], object]) -> Iterator[None]:
    """Undoes what was done before, as far as that is possible, where what follows fails."""
    try:
        yield
    except OSError:
        with suppress(OSError):
            undo()
        raise


def exchange(one: Path, two: Path) -> bool:
    """Gives each of two paths the other's name at once; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    sys.audit("runner.exchange", one, two)  # as Python tells of os.rename
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(two), swap) == 0)


def remove(path: Path) -> None:
    """Removes a checkpoint so that no reader ever sees a part of it; what cannot be deleted now is swept later."""
    trash = path.with_name(f"{_TRASH}{path.name.lstrip('.')}-{secrets.token_hex(4)}")
    with suppress(FileNotFoundError):
        path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def set_aside(paths: Sequence[Path]) -> Path:
    """Moves checkpoints of one folder, given by rising step, into a new folder in there; no reader looks into it."""
    place = paths[0].with_name(f"{_LEFT}{datetime.now():%Y-%m-%d-%H%M%S}-{secrets.token_hex(2)}")
    place.mkdir()
    for path in reversed(paths):
        path.rename(place / path.name)
    sync_folder(place)
    sync_folder(place.parent)
    return place


def bring_back(folder: Path) -> None:
    """Gives checkpoints their names back that a killed process was about to replace."""
    for leftover in _leftovers(folder, _REPLACED):
        final = leftover.with_name(leftover.name.removeprefix(_REPLACED))
        if not final.exists():
            with suppress(OSError):
                leftover.rename(final)


def sweep(folder: Path) -> None:
    """Removes what killed processes left. Only the one process that owns the folder may call it."""
    bring_back(folder)
    for leftover in _leftovers(folder):
        shutil.rmtree(leftover, ignore_errors=True)


def _leftovers(folder: Path, prefix: str = ".") -> list[Path]:
    found = folder.glob(f"{prefix}*") if folder.is_dir() else ()
    return [path for path in found if _LEFTOVER.fullmatch(path.name)]


def expired(paths: Sequence[Path], keep: int, protected: Collection[Path], milestones: int | None = None) -> list[Path]:
    """Which of the complete checkpoints, given by rising step, may go.

    The last `keep` stay (never fewer than two), the `protected` ones, and those whose step is a multiple of
    `milestones`.
    """
    old = paths[: max(len(paths) - max(keep, 2), 0)]
    return [path for path in old if path not in protected and not (milestones and step_of(path) % milestones == 0)]
