"""Links in the paths of `resume` and `init_from`: what they meant at a run's first start is what they mean to it.

`runs/latest` is another run a moment later, at last the very run that begins from it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.recipe.document import read
from runner.recipe.redact import redact

_KEYS = ("resume", "init_from")
#: Values of `resume` that are no paths.
_WORDS = ("auto", "never")
#: In a run's folder: key -> path as it was asked for, and what it meant.
FILE = "links.json"
#: A path that needs no quotes in an override.
_PLAIN = re.compile(r"[A-Za-z0-9_./-]+")


def follow(config: dict[str, Any], written: dict[str, Any], directory: Path) -> None:
    """Puts in the place of each path that leads over a link the one without; what was asked for stays in `written`."""
    for key in _KEYS:
        path = _path(config.get(key))
        if path is None or (key == "resume" and path in _WORDS):
            continue
        meant = _without_links(directory, os.path.expanduser(path) if key == "init_from" else path)
        if meant is None:
            continue
        if _path(redact(config, written)[key]) == path:  # else there is a secret in it
            written[key] = _at(config[key], path)
        config[key] = _at(config[key], meant)


def _without_links(directory: Path, path: str) -> str | None:
    """The same path where links are in it and it exists; None where it can stay as it is."""
    given = os.path.join(os.path.realpath(directory), path)
    if not os.path.exists(given):
        return None
    real = os.path.realpath(given)
    # The hub's cache links a file to one without a suffix, and an index is read with the files beside it.
    if os.path.isfile(given) and (Path(real).suffix != Path(given).suffix or given.endswith(".json")):
        real = os.path.join(os.path.realpath(os.path.dirname(given)), os.path.basename(given))
    return None if real == os.path.normpath(given) else real


def recalled(config: dict[str, Any], written: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration for a run's folder: what is asked for there once more, means what it meant the first time."""
    changed = dict(_changed(config, written))
    if not changed or not (folder / "config.yaml").is_file():
        return config
    known, before = _known(folder), read(folder / "config.yaml").data
    found = dict(config)
    for key, (asked, _) in changed.items():
        if key in known and known[key]["asked"] == asked:
            found[key] = _at(config[key], known[key]["meant"])
        elif _path(before.get(key)) == asked:  # of a version that did not look at links
            found[key] = _at(config[key], asked)
    return found


def to_keep(config: Mapping[str, Any], written: Mapping[str, Any], folder: Path) -> dict[str, dict[str, str]]:
    """What FILE has to say in a run's folder."""
    now = {key: {"asked": asked, "meant": meant} for key, (asked, meant) in _changed(config, written)}
    # The command that goes on names what was meant: whoever then repeats the first command is still understood.
    before = {key: entry for key, entry in _known(folder).items() if _path(config.get(key)) == entry["meant"]}
    return {**before, **now}


def command(words: Sequence[str], config: Mapping[str, Any], written: Mapping[str, Any]) -> list[str]:
    """A command line that names what the links in it meant."""
    words = list(words)
    for key, (_, meant) in _changed(config, written):
        name = key if isinstance(config[key], str) else f"{key}.path"
        places = [number for number, word in enumerate(words) if word.lstrip("+").partition("=")[0] == name]
        # Of several the last one counts; where none says it, a recipe does.
        last = places[-1] if places and name == key else len(words)
        words[last : last + 1] = [_assignment(name, meant)]
        words = [word for number, word in enumerate(words) if number == last or number not in places]
    return words


def _assignment(key: str, path: str) -> str:
    if _PLAIN.fullmatch(path):
        return f"{key}={path}"
    from runner.recipe.overrides import assignment  # with Hydra's grammar

    return assignment(key, path)


def _changed(config: Mapping[str, Any], written: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    """(key, (path as it was asked for, path now)) where `follow` or `recalled` has put another one there."""
    for key in _KEYS:
        asked, meant = _path(written.get(key)), _path(config.get(key))
        if asked is not None and meant is not None and asked != meant and "${" not in asked + meant:
            yield key, (asked, meant)


def _known(folder: Path) -> dict[str, dict[str, str]]:
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return {key: {"asked": str(found[key]["asked"]), "meant": str(found[key]["meant"])} for key in found}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _path(value: Any) -> str | None:
    path = value.get("path") if isinstance(value, Mapping) else value
    return path if isinstance(path, str) else None


def _at(value: Any, path: str) -> Any:
    """A value of `resume` or `init_from` with another path."""
    return {**value, "path": path} if isinstance(value, Mapping) else path
