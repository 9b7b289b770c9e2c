"""Shows problems of the user's input: place, key, value, why, and what would work."""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.errors import Mark, Problem
from runner.recipe.redact import is_secret, without_password

_WIDTH = 80
_LONGEST_VALUE = 200
_LONGEST_LINE = 2_000
_MOST = 50
#: Keys that a recipe has to give: where one is missing, the recipe's file is the place to look at.
_NEEDED = frozenset({"model", "task", "optimizer", "data", "data.train", "train", "batch", "batch.global_size"})
_PLAIN = re.compile(r"[^\W\d][\w./ ${}:@+=~-]*|[\w./~-]+")


def render(problems: Sequence[Problem], origins: Mapping[str, Mark] | None = None, *, directory: Path) -> str:
    """All problems, one paragraph each, in the order of their places. Paths below `directory` are shown from there."""
    placed = [problem.at(nearest(origins or {}, problem.key)) for problem in problems]
    placed.sort(key=lambda problem: _order(problem.mark))
    count = f"{len(placed)} problems" if len(placed) != 1 else "1 problem"
    paragraphs = [_paragraph(problem, directory) for problem in placed[:_MOST]]
    if len(placed) > _MOST:
        paragraphs.append(f"and {len(placed) - _MOST:,} more")
    return "\n\n".join([f"{count} in the configuration", *paragraphs])


def nearest(origins: Mapping[str, Mark], key: str | None) -> Mark | None:
    """The mark of a key, or of the nearest key above it; of a missing one, the recipe (under the empty key)."""
    above = key or ""
    while above:
        if above in origins:
            return origins[above]
        above = above.rpartition(".")[0]
    return origins.get("") if key in _NEEDED else None


def _order(mark: Mark | None) -> tuple[int, str, int, int]:
    if mark is None:
        return (2, "", 0, 0)
    on_command_line = mark.line is None and os.sep not in mark.file
    return (0 if on_command_line else 1, mark.file, mark.line or 0, mark.column or 0)


def _paragraph(problem: Problem, directory: Path) -> str:
    what = problem.key or ""
    if problem.has_value and what and not what.startswith("-"):
        what += f" = {show(problem.value, problem.key)}"
    head = ": ".join(part for part in (place(problem.mark, directory), what) if part)
    lines = [*_wrapped(head, ""), *_wrapped(problem.why, "  "), *_wrapped(problem.fix, "  fix: ")]
    return "\n".join(lines)


def _wrapped(text: str, start: str) -> list[str]:
    """Lines of at most 80 columns; what has no spaces, such as a path, stays whole so that it can be copied."""
    if not text:
        return []
    short = text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}..."
    return textwrap.wrap(
        short, _WIDTH, initial_indent=start, subsequent_indent=" " * max(len(start), 4),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def place(mark: Mark | None, directory: Path) -> str:
    """`file:line:column`, with the file as seen from the directory when it lies below it."""
    if mark is None:
        return ""
    file = Path(mark.file)
    if file.is_absolute():
        for base in (directory.absolute(), directory.resolve()):
            if file.is_relative_to(base):
                file = file.relative_to(base)
                break
    return str(Mark(str(file), mark.line, mark.column))


def show(value: Any, key: str | None = None) -> str:
    """A value as it would stand in YAML on one line, shortened, without secrets."""
    text = "***" if key and is_secret(key) and isinstance(value, (str, list, tuple)) else without_password(_flow(value))
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _flow(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flow(k)}: {show(v, str(k))}" for k, v in list(value.items())[:100]) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_flow(item) for item in value[:100]) + "]"
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and ": " not in value and value[-1] not in ": " and not _reads_otherwise(value)
        return value if plain else json.dumps(value[: 2 * _LONGEST_VALUE], ensure_ascii=False)
    return _number(value)


def _number(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 2000:
        return "a number of more than 600 digits"
    return str(value)


def _reads_otherwise(text: str) -> bool:
    """Whether YAML would take an unquoted text for something else."""
    if text.lower() in ("null", "true", "false", "yes", "no", "on", "off", "~", ""):
        return True
    try:
        float(text.replace("_", ""))
    except ValueError:
        return False
    return True
