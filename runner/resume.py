"""Where a job runs, and whether it begins there, goes on from a checkpoint, or has nothing left to do."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner import distributed
from runner.assemble import Parts
from runner.checkpoint import Checkpointer, extra_of, find, latest
from runner.checkpoint.manifest import Manifest
from runner.distributed import Ranks
from runner.drift import Drift, compare, compare_finished
from runner.errors import wrong
from runner.folder import RunFolder
from runner.launch.failure import told_run
from runner.launch.report import Report
from runner.launch.worker import WorkPlan
from runner.recipe.document import read
from runner.train.progress import Plan
from runner.train.run import Run

log = logging.getLogger("runner")


@dataclass
class Place:
    """Where a job runs: its folder, the checkpoint to go on from, whether it was empty, whether nothing is left.

    `named` says that the checkpoint is the one that `resume` names, and not the last of this very run.
    """

    folder: RunFolder
    resume: Path | None
    fresh: bool
    finished: bool = False
    named: bool = False
    drift: Drift | None = None

    @property
    def told(self) -> tuple[Any, ...]:
        """What the other processes have to know."""
        return self.folder.path, self.resume, self.fresh, self.finished, self.named


def place_of(plan: WorkPlan, parts: Parts, ranks: Ranks) -> Place:
    """The run's folder, locked, and the checkpoint to go on from; after an earlier attempt, where that stopped.

    Raises InputError where the folder is no run's, where what is named is no checkpoint that can be read, or where the
    run would go on as another training.
    """
    again = earlier(plan, ranks)
    where = again or plan.run_dir
    path = None if where is None else Path(plan.directory, where)
    source = None
    if path is None or _is_empty(path):
        source = _named(plan, parts)  # before a folder is made, which would have to go again
        if finished := _nothing_left(source, parts.plan):
            return finished
    folder = RunFolder.named(path) if path else RunFolder.new(Path(plan.directory, "runs"), plan.config["name"])
    folder.lock()
    try:
        if not _is_empty(folder.path):
            return _place_in(folder, plan, parts, again)
        source = source or _named(plan, parts)
        folder.begin()
        return source.place(folder, fresh=True)
    except BaseException:
        folder.unlock()
        raise


def _is_empty(path: Path) -> bool:
    try:
        return all(name.startswith(".") for name in os.listdir(path))
    except OSError:
        return True  # not there, or what RunFolder refuses


def _place_in(folder: RunFolder, plan: WorkPlan, parts: Parts, again: str | None) -> Place:
    """The same in a folder where something ran before: going on there, or from what is named."""
    path, asked = folder.path, plan.config["resume"]
    if again is None and asked == "never":
        raise wrong(
            "resume",
            f"{plan.run_dir} is not empty, and never means not to go on there",
            "name another run_dir, or say resume=auto",
            value="never",
        )
    if again is None and not (path / "status.json").exists():
        raise wrong(
            "run_dir",
            "is not empty and holds no run",
            "name a run's folder, or one that is not there",
            value=plan.run_dir,
        )
    # A scheduler repeats a command: it goes on, and does not begin again from what is named, which may be gone by now.
    before = read(path / "config.yaml").data
    repeated = _names_none(asked) or before.get("resume") == asked
    if repeated and _finished(folder, parts.plan, plan, before):
        return Place(folder, None, False, True)
    last = latest(path / "checkpoints")
    if not _names_none(asked) and (last is None or _asked_for(last) != asked):
        source = _named(plan, parts)
        if last is None or source.path is None or source.path.resolve() != last.resolve():
            elsewhere = source.path is not None and source.path.resolve().parent != (path / "checkpoints").resolve()
            if elsewhere and (finished := _nothing_left(source, parts.plan)):
                folder.unlock()
                return finished
            return source.place(folder)
        if not repeated and _finished(folder, parts.plan, plan, before):
            return Place(folder, None, False, True)
    return Place(folder, last, False, drift=None if last is None else compare(plan, parts, last))


def earlier(plan: WorkPlan, ranks: Ranks) -> str | None:
    """The folder that an earlier attempt of these processes has made."""
    if plan.again is None and plan.report is not None and ranks.attempt:
        return told_run(Report(plan.report)).get("folder")
    return plan.again


def _names_none(asked: str) -> bool:
    """Whether a value of `resume` names no checkpoint."""
    return asked in ("auto", "never")


@dataclass(frozen=True)
class Source:
    """What a run begins from: nothing, or a checkpoint, and what this run does otherwise than that."""

    path: Path | None = None
    drift: Drift | None = None

    def place(self, folder: RunFolder, *, fresh: bool = False) -> Place:
        return Place(folder, self.path, fresh, named=self.path is not None, drift=self.drift)


def _named(plan: WorkPlan, parts: Parts) -> Source:
    """What `resume` names, from which this training can go on."""
    asked = plan.config["resume"]
    if _names_none(asked):
        return Source()
    path = find(Path(plan.directory, asked))
    return Source(path, compare(plan, parts, path))


def _nothing_left(source: Source, length: Plan) -> Place | None:
    """The run that a checkpoint is of, where all steps are done in it already; says so."""
    if source.path is None or Manifest.read(source.path).step < length.steps:
        return None
    above = source.path.parent
    run = above.parent if above.name == "checkpoints" else source.path
    _say_complete(run, length.steps)
    return Place(RunFolder(run), None, False, True)


def _asked_for(checkpoint: Path) -> Any:
    """What `resume` said to the run that saved a checkpoint."""
    extra = extra_of(checkpoint)
    config = extra.get("config") if isinstance(extra, dict) else None
    return config.get("resume") if isinstance(config, dict) else None


def _finished(folder: RunFolder, length: Plan, plan: WorkPlan, before: Mapping[str, Any]) -> bool:
    """Whether a completed run, whose configuration was `before`, has nothing left to do; says so then.

    One that stopped early is complete as well. Raises InputError where another training is asked for than the one
    that is complete.
    """
    told = folder.read_json("summary.json")
    if not told or told.get("status") != "completed" or told.get("planned_steps", 0) < length.steps:
        return False
    drift = compare_finished(plan, before) if before else Drift()
    _say_complete(folder.path, told["steps"])
    drift.tell()
    return True


def _say_complete(run: Path, steps: int) -> None:
    extend = "a larger train.steps or train.epochs extends it"
    log.info("%s is already complete: %d steps; %s", run.name, steps, extend)


def leave_behind(run: Run, source: Path) -> None:
    """Where the user goes back in a run, or on from another one: what was saved afterwards belongs to it no more.

    `source` is the checkpoint that was named. All processes call it.
    """
    saver = run.checkpointer or Checkpointer(run.folder.path / "checkpoints", {})
    place = saver.leave_behind(source, run.progress.step)
    if distributed.rank() == 0:
        (run.folder.path / "summary.json").unlink(missing_ok=True)  # it may say that the run is complete
    if place is not None:
        log.warning("going on from %s; the checkpoints that do not lead to it are in %s now", source, place)
