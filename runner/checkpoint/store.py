"""The folder of a run's checkpoints: what counts as one, how one appears, and how one goes.

A checkpoint is a folder `step_00000100` with a readable manifest and all its files. It appears by one rename and is
never written in place; one that goes is renamed before it is removed. So there is no moment at which a reader sees
a part of one, and what a killed process leaves has a name that no reader takes.
"""

from __future__ import annotations

import logging
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from runner.checkpoint import manifest
from runner.checkpoint.manifest import Damaged, Manifest
from runner.checkpoint.synced import sync_folder
from runner.errors import InputError, RunnerError, wrong

log = logging.getLogger(__name__)

_STEP = re.compile(r"step_([0-9]+)")
_STAGING, _TRASH, _REPLACED = ".tmp-", ".trash-", ".old-"


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
    found = [child for child in folder.iterdir() if _STEP.fullmatch(child.name) and child.is_dir()]
    return sorted(found, key=lambda path: (step_of(path), path.name))


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, passing over damaged ones with a warning; None where there never was one.

    Raises RunnerError where there are checkpoints and none is complete: a silent fresh start would hide it. Raises
    InputError where the newest was written by a newer version of the program.
    """
    found = candidates(folder)
    for path in reversed(found):
        try:
            Manifest.read(path)
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
    if not path.is_dir():
        why = "is not a folder" if path.exists() else "does not exist"
        raise wrong(key, f"{path} {why}", fix, value=str(path))
    if (path / manifest.NAME).exists() or _STEP.fullmatch(path.name):
        try:
            Manifest.read(path)
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


@contextmanager
def committed(folder: Path, step: int) -> Iterator[Path]:
    """An empty staging folder that becomes the checkpoint of `step` when the block ends, and is gone if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    final = path_of(folder, step)
    staging = folder / f"{_STAGING}{final.name}-{secrets.token_hex(4)}"
    staging.mkdir()
    try:
        yield staging
        sync_folder(staging)
        _publish(staging, final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _publish(staging: Path, final: Path) -> None:
    # The one that is replaced comes back in `sweep` if the process dies between the two renames.
    replaced = final.with_name(f"{_REPLACED}{final.name}") if final.exists() else None
    if replaced:
        final.rename(replaced)
    staging.rename(final)
    sync_folder(final.parent)
    if replaced:
        remove(replaced)


def remove(path: Path) -> None:
    """Removes a checkpoint so that no reader ever sees a part of it; what cannot be deleted now is swept later."""
    trash = path.with_name(f"{_TRASH}{path.name.lstrip('.')}-{secrets.token_hex(4)}")
    with suppress(FileNotFoundError):
        path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what killed processes left. Only the one process that owns the folder may call it."""
    for leftover in folder.glob(f"{_REPLACED}*") if folder.is_dir() else ():
        final = leftover.with_name(leftover.name.removeprefix(_REPLACED))
        if final.exists():
            remove(leftover)
        else:
            leftover.rename(final)
    for prefix in (_STAGING, _TRASH):
        for leftover in folder.glob(f"{prefix}*") if folder.is_dir() else ():
            shutil.rmtree(leftover, ignore_errors=True)


def expired(paths: Sequence[Path], keep: int, protected: Collection[Path]) -> list[Path]:
    """Which of the checkpoints, given by rising step, may go: all but the last `keep` and the protected ones."""
    return [path for path in paths[: max(len(paths) - keep, 0)] if path not in protected]
