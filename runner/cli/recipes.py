"""`runner recipes`: the recipes that can be found here; `runner recipes NAME` prints one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from runner.errors import InputError, Problem
from runner.recipe.overrides import COMMAND_LINE
from runner.recipe.sources import Found, search, unknown_recipe
from runner.recipe.sources import recipes as find

USAGE = """\
usage: runner recipes [NAME] [--json] [--config-dir FOLDER]

Lists the recipes that can be found here, each with its description and where it comes from; with NAME, prints that one.
"""


def recipes(argv: Sequence[str]) -> int:
    """The verb. Raises InputError for an unknown name or flag."""
    names, as_json, config_dirs = _arguments(argv)
    if names is None:
        print(USAGE, end="")
        return 0
    found = find(search(Path.cwd(), config_dirs))
    if names:
        _print_one(names[0], found, as_json)
    elif as_json:
        print(json.dumps([_plain(recipe) for recipe in found], indent=2, ensure_ascii=False))
    else:
        _print_all(found)
    return 0


def _arguments(argv: Sequence[str]) -> tuple[list[str] | None, bool, list[Path]]:
    """(names, --json, config dirs); no names at all for --help."""
    names: list[str] = []
    config_dirs: list[Path] = []
    as_json = False
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if word in ("--help", "-h"):
            return None, False, []
        if word == "--json":
            as_json = True
        elif flag in ("--config-dir", "-cd"):
            folder = Path(value if equals else next(words, ""))
            if not os.path.isdir(folder):  # False also for what is no name
                raise InputError(Problem(f"{flag} {folder}", "there is no such folder", "name one", mark=COMMAND_LINE))
            config_dirs.append(folder)
        elif word.startswith("-") or names:
            why = "there is no such flag" if word.startswith("-") else "one recipe can be printed at a time"
            raise InputError(Problem(word, why, "usage: runner recipes [NAME] [--json]", mark=COMMAND_LINE))
        else:
            names.append(word)
    return names, as_json, config_dirs


def _print_one(name: str, found: Sequence[Found], as_json: bool) -> None:
    wanted = name.removesuffix(".yaml")
    for recipe in found:
        if recipe.name == wanted:
            text = recipe.file.read_text(encoding="utf-8-sig", errors="replace")
            print(
                json.dumps({**_plain(recipe), "text": text}, indent=2, ensure_ascii=False) if as_json else text, end=""
            )
            if as_json:
                print()
            return
    raise InputError(unknown_recipe(name, [recipe.name for recipe in found], COMMAND_LINE))


def _plain(recipe: Found) -> dict[str, str | None]:
    return {
        "name": recipe.name,
        "description": recipe.description,
        "from": recipe.provider,
        "file": str(recipe.file),
        "replaces": recipe.replaces,
    }


def _source(recipe: Found) -> str:
    if recipe.replaces is None:
        return recipe.provider
    return f"{recipe.provider}, replaces the {'one of ' if recipe.replaces != 'built-in' else ''}{recipe.replaces}" + (
        " one" if recipe.replaces == "built-in" else ""
    )


def _print_all(found: Sequence[Found]) -> None:
    """A table on a terminal, one line a recipe in a pipe."""
    if not found:
        print("There are no recipes here. A recipe is a YAML file in ./recipes.")
        return
    if sys.stdout is not None and sys.stdout.isatty():
        _print_table(found)
        return
    width = max(len(recipe.name) for recipe in found)
    text = max(len(recipe.description) for recipe in found)
    for recipe in found:
        print(f"{recipe.name:{width}}  {recipe.description:{text}}  {_source(recipe)}".rstrip())


def _print_table(found: Sequence[Found]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it does", overflow="fold")
    table.add_column("from", overflow="fold")
    for recipe in found:
        table.add_row(Text(recipe.name, style="cyan"), Text(recipe.description), Text(_source(recipe), style="dim"))
    console = Console()
    console.print(table)
    console.print(Text("\nrunner recipes NAME prints one; runner +recipe=NAME trains it.", style="dim"))
