"""`--help`: what the program does, its verbs, groups, keys and flags, from what is really there."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

from runner.recipe.schema import Config, Key, elsewhere, keys_of, variants
from runner.recipe.sources import RECIPE, Repository, search
from runner.recipe.validate import describe, plain

_WIDTH = 80

_VERBS = (
    ("runner +recipe=NAME [key=value …]", "trains"),
    ("runner -m +recipe=NAME precision=fp32,bf16", "a sweep: one run for each combination"),
    ("runner recipes [NAME]", "the recipes that can be found here; prints one"),
)

_FLAGS = (
    ("--cfg job, -c job", "shows the configuration instead of training"),
    ("--resolve", "with --cfg: interpolations resolved"),
    ("--package KEY, -p", "with --cfg: only what is below a key"),
    ("--info [defaults|config|searchpath], -i", "shows where the configuration comes from"),
    ("--multirun, -m", "a sweep; key=a,b gives several values"),
    ("--config-dir FOLDER, -cd", "a further folder like conf/; may be repeated"),
    ("--json", "JSON on stdout: recipes, --cfg job, the summary of a run or sweep"),
    ("--version", "the version"),
    ("--help, -h", "this text"),
)

_INTRODUCTION = """\
runner: trains a PyTorch model as a recipe, one YAML file, says.
`python -m runner` is the same program.
"""

_OVERRIDES = """\
Overrides, in any order: key=value sets a value, group=option chooses an option, ~key removes one. Command line \
before recipe before ./conf before built-in. Files in ./recipes, ./conf and ./plugins are found as the built-in \
ones are.
"""


def usage(directory: Path) -> str:
    """The whole text, with the recipes and options that can be found from a directory."""
    repository = Repository(search(directory))
    names = list(dict.fromkeys([*repository.root_groups, *repository.groups()]))
    groups = [(name, ", ".join(repository.options(name))) for name in names if name != RECIPE]
    recipes = ", ".join(repository.options(RECIPE)) or "none"
    parts = [
        _INTRODUCTION,
        _table("Commands", _VERBS, 46),
        _table("Recipes", [("+recipe=", recipes)], 14),
        _table("Groups", groups, 14),
        "\n".join(["Keys", *_keys(Config, "")]) + "\n",
        textwrap.fill(_OVERRIDES, _WIDTH) + "\n",
        _table("Flags", _FLAGS, 42),
    ]
    return "\n".join(parts)


def _table(title: str, rows: object, column: int) -> str:
    lines = [title]
    for left, right in rows:  # type: ignore[attr-defined]
        lines += _row(f"  {left}", right, column)
    return "\n".join(lines) + "\n"


def _row(left: str, right: str, column: int) -> list[str]:
    """Left and right, the right one wrapped in its column; below the left where that is too long."""
    wrapped = textwrap.wrap(right, _WIDTH - column, break_on_hyphens=False) or [""]
    if len(left) >= column:
        return [left, *(" " * column + line for line in wrapped)]
    first = f"{left:{column}}{wrapped[0]}".rstrip()
    return [first, *(" " * column + line for line in wrapped[1:])]


def _keys(section: type, above: str) -> Iterator[str]:
    """A line for every key: its name, what it may be, its default and its help."""
    for key in keys_of(section).values():
        below = key.section
        if below is None or key.optional:
            yield from _row(f"  {above}{key.name}", f"{key.help}{_kind(key)}", 26)
        if below is not None:
            yield from _keys(below, f"{above}{key.name}.")
            yield from _options(below, f"{above}{key.name}")


def _options(section: type, name: str) -> Iterator[str]:
    """A line for every key that a section has under one of its names only."""
    for kind in variants(section):
        for key in keys_of(kind).values():
            if names := elsewhere(section, key.name) if key.name not in keys_of(section) else []:
                yield from _row(f"  {name}.{key.name}", f"{name}={names[0]}: {key.help}{_kind(key)}", 26)


def _kind(key: Key) -> str:
    default = key.default
    if key.builds or isinstance(default, (dict, list)) or key.section is not None:
        return ""
    kind = describe(key).removesuffix(", or null") if key.kinds[0] is not object else ""
    shown = "" if default is None else f"; default {plain(default)}"
    return f" [{kind}{shown}]" if kind and kind != "a mapping" else ""
