"""`init_from`, the weights to begin with, as it was asked for: its keys, and patterns of names. Knows no tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.errors import InputError, Problem

KEY = "init_from"
#: YAML and the command line read 0 and 0. as numbers.
_QUOTES = "put names that look like numbers in quotes"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


@dataclass(frozen=True)
class Asked:
    """The configuration's `init_from`.

    Args:
        path: a file, a folder or the hub's name of a model.
        strict: whether every tensor of the model must be there, and nothing else.
        rename: pattern of a stored name's beginning -> what stands there in the model's name; the first that fits.
        only: patterns of the model's names that are wanted; none for all.
        part: of a checkpoint of this program, `model`, or `ema` for the averaged weights in the place of the trained.
        revision: of a model on the hub.
    """

    path: str
    strict: bool = True
    rename: Mapping[str, str] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    part: str = "model"
    revision: str | None = None

    @classmethod
    def of(cls, value: Any) -> Asked:
        """Raises InputError with all that is wrong, without looking at any file."""
        values: dict[str, Any] = {"path": value} if isinstance(value, str) else dict(value)
        problems = list(shape_problems(value))
        if problems:
            raise InputError(*problems)
        given: dict[str, Any] = {name: item for name, item in values.items() if item is not None}
        if "only" in given:
            given["only"] = tuple(given["only"])
        return cls(**given)


def shape_problems(value: Any) -> Iterable[Problem]:
    """What is wrong with an `init_from`, whatever files there are."""
    values: Mapping[Any, Any] = {"path": value} if isinstance(value, str) else value
    known: dict[str, tuple[Callable[[Any], bool], str, str]] = {
        "path": (
            lambda v: isinstance(v, str) and bool(v.strip()) and "\0" not in v,
            "a path, or a hub's name",
            "write path: FOLDER; a name of digits alone in quotes",
        ),
        "strict": (lambda v: v is None or isinstance(v, bool), "true or false", "write strict: false, without quotes"),
        "rename": (
            _is_renaming,
            "a mapping of texts: the beginning of a stored name -> what stands there here",
            f"write rename: {{encoder: backbone}}; {_QUOTES}, in a recipe",  # Hydra's grammar has no quotes in keys
        ),
        "only": (
            lambda v: v is None or (isinstance(v, list) and all(isinstance(i, str) for i in v)),
            "a list of texts",
            f"write only: ['0.', head]; {_QUOTES}",
        ),
        "part": (lambda v: v in (None, "model", "ema"), "model, or ema", "write part: ema, or leave it out"),
        "revision": (
            lambda v: v is None or (isinstance(v, str) and bool(v)),
            "a text",
            "put it in quotes: revision: '1234567'",
        ),
    }
    for name, value in values.items():
        if name not in known:
            yield Problem(f"{KEY}.{name}", "unknown key", f"there are {', '.join(known)}", value=value)
        elif not known[name][0](value):
            yield Problem(f"{KEY}.{name}", f"must be {known[name][1]}", known[name][2], value=value)
    if "path" not in values:
        yield Problem(f"{KEY}.path", "is missing: where the weights are", "give a path, or a hub's name")
    renaming = values.get("rename") if _is_renaming(values.get("rename")) else None
    only = values.get("only") if isinstance(values.get("only"), list) else None
    for name, patterns in (("rename", list(renaming or ())), ("only", [p for p in only or () if isinstance(p, str)])):
        for pattern in patterns:
            if (why := _pattern_problem(pattern)) is not None:
                yield Problem(
                    f"{KEY}.{name}", f"{pattern!r} {why}", "write the beginning of a name; * is one word in it"
                )
    for pattern, replacement in (renaming or {}).items():
        if _stars(replacement) > _stars(pattern):
            why = f"{replacement!r} has more * than {pattern!r}, from which they are taken"
            yield Problem(f"{KEY}.rename", why, "use as many on both sides")


def _is_renaming(value: Any) -> bool:
    return value is None or (
        isinstance(value, Mapping) and all(isinstance(k, str) and isinstance(v, str) for k, v in value.items())
    )


def is_hub_name(path: str) -> bool:
    """Whether a text that is no path here may be the hub's name of a model: NAME or ORG/NAME."""
    return _HUB_NAME.fullmatch(path) is not None and not path.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt"))


def problem_of_path(value: Any, directory: Path) -> Problem | None:
    """What can be said before anything is opened: a path that is no hub's name must exist."""
    path = value if isinstance(value, str) else value.get("path") if isinstance(value, Mapping) else None
    if not isinstance(path, str) or "\0" in path or is_hub_name(path):
        return None
    try:
        if (directory / Path(path).expanduser()).exists():
            return None
    except (OSError, RuntimeError):
        pass  # a name that is too long, a home that nobody has
    return Problem(KEY, "does not exist, and is no name of the hub", "give a file, a folder or ORG/NAME", value=path)


# --- patterns ---------------------------------------------------------------------------------------------------------


def _plain_pattern(pattern: str) -> str:
    """Prefixes that are written as regular expressions (`^bert\\.`) mean the same."""
    return pattern.removeprefix("^").replace("\\.", ".")


def _stars(pattern: str) -> int:
    return len(re.findall(r"\*\*|\*", pattern))


def _pattern_problem(pattern: str) -> str | None:
    odd = sorted(set(_plain_pattern(pattern)) & set("\\^$()[]{}|+?"))
    if odd:
        return f"is no pattern of names: it has {' '.join(odd)}"
    if _stars(pattern) > 4 or pattern.count("**") > 1 or "***" in pattern:
        return "has too many stars"
    return "is too long" if len(pattern) > 500 else None


def matcher(pattern: str) -> re.Pattern[str]:
    """The beginning of a name. `*` stays within a word between dots and `**` stands once: nothing is tried often."""
    parts = re.split(r"(\*\*|\*)", _plain_pattern(pattern))
    words = {"*": r"([^.]*)", "**": r"(.*)"}
    return re.compile("".join(words.get(part, re.escape(part)) for part in parts), re.DOTALL)


def renamer(rename: Mapping[str, str]) -> Callable[[str], str]:
    """Name in the file -> name in the model."""
    rules = [(matcher(pattern), replacement) for pattern, replacement in rename.items()]

    def renamed(name: str) -> str:
        for pattern, replacement in rules:
            if (match := pattern.match(name)) is not None:
                return _filled(replacement, match.groups()) + name[match.end() :]
        return name

    return renamed


def _filled(replacement: str, taken: tuple[str, ...]) -> str:
    """A replacement with what the stars of its pattern stood for, in their order."""
    pieces = re.split(r"\*\*|\*", replacement)
    return "".join(piece + (taken[i] if i + 1 < len(pieces) else "") for i, piece in enumerate(pieces))
