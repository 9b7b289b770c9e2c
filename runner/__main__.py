"""`python -m runner` and the console script `runner`: a verb or a run, clear errors out."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from runner import __version__, garbage
from runner.console import say
from runner.errors import InputError, RunnerError
from runner.launch.environment import Environment
from runner.launch.worker import leave_on_signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code: 0 done, 1 failed, 2 wrong input, 75 or 130 interrupted."""
    started = time.time()
    early = leave_on_signals()
    garbage.seldom()
    try:
        return _run(arguments, started)
    finally:
        garbage.released()
        for number, handler in early.items():
            signal.signal(number, handler)


def _run(arguments: Sequence[str] | None, started: float) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    full = False
    try:
        environment = Environment.read()
        full = environment.full_error
        return _verb(words, environment, started)
    except InputError as error:
        from runner.cli.train import show

        show(error, {}, Path.cwd(), full)
        return error.exit_code
    except RunnerError as error:
        say(f"runner: {error}\n", sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        from runner.signals import NOTHING_TO_SAVE

        say(f"\ninterrupted before anything was trained: {NOTHING_TO_SAVE}\n", sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; what is left must not go to a closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _verb(words: list[str], environment: Environment, started: float) -> int:
    if words and words[0] == "recipes":
        from runner.cli.recipes import recipes

        return recipes(words[1:])
    if not words:
        from runner.cli.help import usage

        print(usage(Path.cwd()))
        return 2
    from runner.recipe.overrides import parse_arguments

    invocation = parse_arguments(words)
    if invocation.version:
        print(f"runner {__version__}")
        return 0
    if invocation.help:
        from runner.cli.help import usage

        print(usage(Path.cwd()))
        return 0
    if invocation.hydra_help or invocation.info is not None or invocation.shell_completion:
        from runner.cli.hydra import delegate

        return delegate(invocation)
    if invocation.cfg is not None:
        from runner.cli.config import show_config

        return show_config(invocation)
    if invocation.multirun:
        from runner.cli.sweep import sweep

        return sweep(invocation, environment, started)
    from runner.cli.train import train

    return train(invocation, environment, started)


if __name__ == "__main__":
    sys.exit(main())
