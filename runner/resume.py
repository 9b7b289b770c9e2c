"""Where a job runs, and whether it begins there, goes on from a checkpoint, or has nothing left to do."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from runner.assemble import Parts
from runner.checkpoint import extra_of, find, latest
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
    """Where a job runs: its folder, the checkpoint to go on from, whether it was empty, whether nothing is left."""

    folder: RunFolder
    resume: Path | None
    fresh: bool
    finished: bool = False
    drift: Drift | None = None


def place_of(plan: WorkPlan, parts: Parts, ranks: Ranks) -> Place:
    """The run's folder, locked, and the checkpoint to go on from; after an earlier attempt, where that stopped.

    Raises InputError where the folder is no run's, where what is named is no checkpoint that can be read, or where the
    run would go on as another training.
    """
    resume, again = plan.config["resume"], _again(plan, ranks)
    named = None if resume in ("auto", "never") else find(Path(plan.directory, resume))
    drift = None if named is None else compare(plan, parts, named)
    if plan.run_dir is None and again is None:
        new = RunFolder.new(Path(plan.directory, "runs"), plan.config["name"])
        new.begin()
        return Place(new, named, True, drift=drift)
    path = Path(again or Path(plan.directory, plan.run_dir or ""))
    folder = RunFolder.named(path)
    folder.lock()
    try:
        return _place_in(folder, plan, parts, named, drift, again)
    except BaseException:
        folder.unlock()
        raise


def _place_in(
    folder: RunFolder, plan: WorkPlan, parts: Parts, named: Path | None, drift: Drift | None, again: str | None
) -> Place:
    """The same in a folder that is named: a fresh start, or going on there."""
    path = folder.path
    if all(child.name.startswith(".") for child in path.iterdir()):
        folder.begin()
        return Place(folder, named, True, drift=drift)
    if again is None and plan.config["resume"] == "never":
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
    if named is not None and not _repeated(plan, path, named):
        return Place(folder, named, False, drift=drift)
    if _finished(folder, parts.plan, plan):
        return Place(folder, None, False, True)
    last = latest(path / "checkpoints")
    return Place(folder, last, False, drift=None if last is None else compare(plan, parts, last))


def _again(plan: WorkPlan, ranks: Ranks) -> str | None:
    """The folder that an earlier attempt of these processes has made."""
    if plan.again is None and plan.report is not None and ranks.attempt:
        return told_run(Report(plan.report)).get("folder")
    return plan.again


def _repeated(plan: WorkPlan, path: Path, named: Path) -> bool:
    """Whether the newest checkpoint of a folder is what came of this command, which names one to go on from.

    A scheduler repeats a command: it goes on, and does not begin again from what is named.
    """
    last = latest(path / "checkpoints")
    if last is None or last.resolve() == named.resolve():
        return last is not None
    extra = extra_of(last)
    made_by = extra.get("config") if isinstance(extra, dict) else None
    return isinstance(made_by, dict) and made_by.get("resume") == plan.config["resume"]


def _finished(folder: RunFolder, length: Plan, plan: WorkPlan) -> bool:
    """Whether a completed run has nothing left to do, and says so. One that stopped early is complete as well.

    Raises InputError where another training is asked for than the one that is complete.
    """
    told = folder.read_json("summary.json")
    if not told or told.get("status") != "completed" or told.get("planned_steps", 0) < length.steps:
        return False
    before = read(folder.path / "config.yaml").data
    drift = compare_finished(plan, before) if before else Drift()
    extend = "a larger train.steps or train.epochs extends it"
    log.info("%s is already complete: %d steps; %s", folder.path.name, told["steps"], extend)
    drift.tell()
    return True


def leave_behind(run: Run, resume: Path | None, plan: WorkPlan) -> None:
    """Where the user goes back in a run: what was saved afterwards belongs to it no more."""
    if resume is None or run.checkpointer is None or plan.config["resume"] in ("auto", "never"):
        return
    place = run.checkpointer.leave_behind(resume, run.progress.step)
    if place is not None:
        (run.folder.path / "summary.json").unlink(missing_ok=True)  # it may say that the run is complete
        log.warning("going on from %s; the checkpoints that do not lead to it are in %s now", resume, place)
