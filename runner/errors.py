"""The errors a user sees: a problem has a key, a value, why it is wrong and what would be right."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import PurePath
from types import NoneType
from typing import Any

#: Words in a key whose value is nobody else's business.
_SECRET = re.compile(r"(token|password|secret|key)$", re.IGNORECASE)

_NO_VALUE: Any = type("NoValue", (), {"__repr__": lambda self: "<no value>", "__bool__": lambda self: False})()


@dataclass(frozen=True)
class Mark:
    """Where something stands: a file with line and column (both from 1), or the command line."""

    file: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the user's input.

    `key` is the dotted configuration key (None: not about a key), `why` a clause that says what is wrong,
    `fix` a sentence with what would work, `mark` where the key stands (added by whoever knows the files).
    """

    key: str | None
    why: str
    fix: str = ""
    value: Any = _NO_VALUE
    mark: Mark | None = None

    @property
    def has_value(self) -> bool:
        return self.value is not _NO_VALUE

    def at(self, mark: Mark | None) -> Problem:
        """The same problem with its place, unless it has one already."""
        return self if self.mark is not None or mark is None else replace(self, mark=mark)


class RunnerError(Exception):
    """Base of the errors that are shown as a message, without a traceback."""

    exit_code = 1


class InputError(RunnerError):
    """The user's input is wrong: exit code 2. Carries all problems that are known, not only the first."""

    exit_code = 2

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("; ".join(map(_line, problems)))


def _line(problem: Problem) -> str:
    """`key = value: why (fix: ...)`, as far as there is each, for a traceback or a log."""
    about = "" if problem.key is None else f"{problem.key}{_shortly(problem)}: "
    return f"{about}{problem.why}{f' (fix: {problem.fix})' if problem.fix else ''}"


def _shortly(problem: Problem) -> str:
    """` = value` for what is short and may be read by everybody; containers may hold secrets."""
    value = problem.value
    if not isinstance(value, (str, PurePath, float, int, NoneType)) or _SECRET.search(problem.key or ""):
        return ""
    if isinstance(value, int) and value.bit_length() > 200:
        return ""
    plain = isinstance(value, str) and value != "" and value.isprintable() and value == value.strip()
    text = str(value) if plain or not isinstance(value, str) else repr(value)
    return f" = {text if len(text) <= 80 else f'{text[:60]}...{text[-15:]}'}"


class TrainingStopped(RunnerError):
    """The training itself cannot go on, for example because the loss is not finite: exit code 1."""


def wrong(key: str | None, why: str, fix: str = "", **value: Any) -> InputError:
    """An InputError of one problem: `raise wrong("data.train", "no such file", "give a path", value=path)`."""
    return InputError(Problem(key, why, fix, **value))


class Follows(RunnerError):
    """Another process fails and says why; this one only follows."""


class Elsewhere(Follows):
    """The input is wrong, and another process tells the user what."""

    exit_code = 2
