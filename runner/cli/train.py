"""`runner +recipe=NAME …`: one training run, in this process, in processes of its own, or in those of a launcher."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from runner import trust
from runner.console import say, scrub
from runner.distributed import Ranks
from runner.errors import Elsewhere, InputError, Mark, Problem
from runner.folder import RunFolder
from runner.launch import processes
from runner.launch.environment import Environment
from runner.launch.failure import record, share
from runner.launch.worker import WorkPlan, leave
from runner.places import make_importable
from runner.recipe import links
from runner.recipe.compose import Composition, compose, nearest
from runner.recipe.overrides import Invocation
from runner.recipe.problems import render

if TYPE_CHECKING:
    from torch.distributed import Store

#: The entry point of every process of a run.
WORK = "runner.cli.train:work"


def train(invocation: Invocation, environment: Environment, started: float) -> int:
    """Composes, checks and trains. Returns the exit code; raises InputError with all problems of the configuration."""
    ranks = environment.ranks
    if ranks is not None and ranks.world_size > 1:
        leave(_in_group(invocation, environment, ranks, started))
    return launch(composed(invocation, environment, started), environment)


def composed(invocation: Invocation, environment: Environment, started: float) -> WorkPlan:
    """The plan of a command line; says what the user should know of it. Raises InputError with all problems."""
    directory = Path.cwd()
    composition = compose(invocation.overrides, directory=directory, config_dirs=invocation.config_dirs)
    raise_problems([*invocation.problems, *problems_of(composition, environment)], composition)
    for note in [*composition.notes, *processes.notes(composition.config, environment)]:
        say(f"{note}\n", sys.stderr if invocation.json else sys.stdout)
    plan = plan_of(composition, command_of(invocation), directory, environment, started)
    if invocation.json:
        plan.json, plan.terminal = True, "dumb"
    return plan


def problems_of(composition: Composition, environment: Environment) -> list[Problem]:
    """What is wrong with a configuration, and with the processes that it and a launcher ask for.

    A configuration that is right says afterwards what the links in it mean now: no folder is made yet, and
    `runs/latest` is still the one that was meant.
    """
    world = processes.processes(composition.config, environment)
    problems = [*composition.check(world), *processes.check(composition.config, environment)]
    if not problems:
        links.follow(composition.config, composition.unresolved, Path.cwd())
    return problems


def launch(plan: WorkPlan, environment: Environment) -> int:
    """Does the work of a plan in as many processes as it asks for."""
    if plan.run_dir is not None:
        # Found out here at once, and again by whoever then makes the folder its own.
        try:
            RunFolder(Path(plan.directory, plan.run_dir)).check_free()
        except InputError as error:
            raise InputError(*(p.at(nearest(_places(plan), p.key)) for p in error.problems)) from error
    if processes.nodes(plan.config) > 1:
        from runner.launch import elastic

        return elastic.run(WORK, plan, processes.on_node(plan.config))
    count = processes.processes(plan.config, environment)
    if count == 1 and not plan.config["launch"]["max_restarts"]:
        return work(plan, Ranks())
    from runner.launch import local

    return local.supervise(WORK, plan, count)


def _in_group(invocation: Invocation, environment: Environment, ranks: Ranks, started: float) -> int:
    """This process's part under another launcher, which started the others as well.

    The first process composes, and tells the others, who wait for its plan; also where there is none.
    """
    if not ranks.main:
        return work(None, ranks)
    try:
        plan = composed(invocation, environment, started)
    except BaseException:
        _refuse(ranks)
        raise
    return work(plan, ranks)


def raise_problems(problems: Sequence[Problem], composition: Composition) -> None:
    """Raises InputError where there are problems, each with the place of its key."""
    if problems:
        raise InputError(*(problem.at(nearest(composition.origins, problem.key)) for problem in problems))


def command_of(invocation: Invocation) -> list[str]:
    """The command line that repeats a run."""
    folders = [word for folder in invocation.config_dirs for word in ("--config-dir", str(folder))]
    return [*invocation.overrides, *folders]


def plan_of(
    composition: Composition, command: list[str], directory: Path, environment: Environment, started: float
) -> WorkPlan:
    return WorkPlan(
        config=composition.config,
        written=composition.unresolved,
        command=command,
        directory=str(directory),
        started=started,
        marks={key: [mark.file, mark.line, mark.column] for key, mark in composition.origins.items()},
        bound=composition.bound,
        run_dir=composition.config["run_dir"],
        terminal=environment.terminal,
        full_error=environment.full_error,
    )


def _places(plan: WorkPlan) -> dict[str, Mark]:
    return {key: Mark(*mark) for key, mark in plan.marks.items()}


# --- in every process of a run ----------------------------------------------------------------------------------------


def work(plan: WorkPlan | None, ranks: Ranks) -> int:
    """This process's part of a run, after the first one's plan; the user's mistakes are shown where they stand.

    A parent that waits for records (`plan.report`) shows them itself.
    """
    from runner import console, distributed, garbage
    from runner.job import work as do

    garbage.imported()
    store = None
    if ranks.world_size > 1:
        store = distributed.store(ranks)
        plan = _agreed(plan, ranks, store)
    if plan is None:
        return InputError.exit_code
    if (folder := plan.again or plan.run_dir) is not None:
        # In every process: the first one writes into the folder only when all have come to it.
        plan.config = links.recalled(plan.config, plan.written, Path(plan.directory, folder))
    if ranks.main:
        console.speak(aside=plan.json)
    else:
        _be_quiet()
    try:
        if plan.bound:
            make_importable(Path(plan.directory))
            trust.confirm(plan.bound, plan.config["trust"])
        code = do(plan, ranks, store)
    except Elsewhere as error:
        code = error.exit_code
        if plan.report is not None:
            record(plan, ranks, error, code)
    except InputError as error:
        code = _refused(error, plan, ranks, store)
    except BrokenPipeError:
        if plan.report is not None:
            raise
        # Handled here: __main__ takes it for a reader who has seen enough of a list, and that is no failure.
        say(scrub(traceback.format_exc()), sys.stderr)
        code = 1
    if code in (1, InputError.exit_code) and store is not None and ranks.keep_store:
        share(plan, ranks, store)
    return code


def _be_quiet() -> None:
    """Keeps the program's messages off the terminal; they go to this process's log once the run has a folder."""
    log = logging.getLogger("runner")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(logging.NullHandler())


def _refused(error: InputError, plan: WorkPlan, ranks: Ranks, store: Store | None) -> int:
    """Hands the user's mistake to the parent, or shows it where no other process has done so."""
    if plan.report is not None:
        record(plan, ranks, error, error.exit_code)
    elif store is None or _first_to_tell(store):
        show(error, _places(plan), Path(plan.directory), plan.full_error)
    return error.exit_code


def _first_to_tell(store: Store) -> bool:
    try:
        return store.add("told", 1) == 1
    except RuntimeError:
        return False  # the first process has told it, and gone


_PLAN = "plan"


def _agreed(plan: WorkPlan | None, ranks: Ranks, store: Store) -> WorkPlan | None:
    """The first process's plan, in all of them; None where it has none."""
    if ranks.main:
        assert plan is not None
        store.set(_PLAN, plan.text())
        return plan
    while not store.check([_PLAN]):  # not by waiting in `get`, where no signal would be heard
        time.sleep(0.02)
    text = store.get(_PLAN).decode()
    if not text:
        store.add("refused", 1)
        return None
    own = None if plan is None else plan.report
    # The summary on stdout (--json) is said once, by the first process.
    return replace(WorkPlan.parse(text), report=own, terminal="dumb", json=False)


def _refuse(ranks: Ranks) -> None:
    """Lets the other processes know that there is no plan, and waits a moment for them to hear it."""
    from runner import distributed

    with suppress(Exception):
        store = distributed.store(ranks)
        store.set(_PLAN, "")
        until = time.monotonic() + 10.0
        while not ranks.keep_store and time.monotonic() < until and store.add("refused", 0) < ranks.world_size - 1:
            time.sleep(0.05)


def show(error: InputError, origins: dict[str, Mark], directory: Path, full: bool) -> None:
    """Prints all problems of an InputError to stderr, with the traceback only where HYDRA_FULL_ERROR asks for it."""
    if full:
        say("".join(traceback.format_exception(error)), sys.stderr)
    say(f"{render(list(error.problems), origins, directory=directory)}\n", sys.stderr)
