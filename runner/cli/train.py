"""`runner +recipe=NAME …`: one training run, in this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from runner.errors import InputError, Mark, Problem
from runner.launch.environment import Environment
from runner.launch.worker import WorkPlan
from runner.recipe.compose import Composition, compose, nearest
from runner.recipe.overrides import Invocation
from runner.recipe.problems import render


def train(invocation: Invocation, environment: Environment, started: float) -> int:
    """Composes, checks and trains. Returns the exit code; raises InputError with all problems of the configuration."""
    directory = Path.cwd()
    composition = compose(invocation.overrides, directory=directory, config_dirs=invocation.config_dirs)
    raise_problems([*invocation.problems, *composition.check(), *environment.check()], composition)
    for note in composition.notes:
        print(note, file=sys.stderr if invocation.json else sys.stdout, flush=True)
    plan = plan_of(composition, command_of(invocation), directory, environment, started)
    if invocation.json:
        plan.json, plan.terminal = True, "dumb"
    return work(plan)


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
        run_dir=composition.config["run_dir"],
        terminal=environment.terminal,
        full_error=environment.full_error,
    )


def work(plan: WorkPlan) -> int:
    """The job of a plan, with the user's mistakes shown where they stand."""
    from runner import console
    from runner.job import work as do

    console.speak(aside=plan.json)
    try:
        return do(plan)
    except InputError as error:
        show(error, {key: Mark(*mark) for key, mark in plan.marks.items()}, Path(plan.directory), plan.full_error)
        return error.exit_code


def show(error: InputError, origins: dict[str, Mark], directory: Path, full: bool) -> None:
    """Prints all problems of an InputError to stderr, with the traceback only where HYDRA_FULL_ERROR asks for it."""
    if full:
        import traceback

        traceback.print_exception(error)
    print(render(list(error.problems), origins, directory=directory), file=sys.stderr, flush=True)
