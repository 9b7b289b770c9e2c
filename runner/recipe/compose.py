"""Puts a configuration together: schema, conf/, recipe and command line, with the place of every key.

Hydra's pieces do what users know: its override grammar, its search path, its defaults lists. The merging is done
here, so that every key knows its file, line and column, and all problems are found in one go.
"""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import version
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override, OverrideType, ValueType
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from omegaconf._utils import get_omega_conf_dumper
from omegaconf.errors import OmegaConfBaseException

from runner.errors import Mark, Problem
from runner.recipe.document import Keys
from runner.recipe.foreign import Foreign, built_in_targets, foreign_files, granted, remote_code
from runner.recipe.interpolation import resolve
from runner.recipe.overrides import COMMAND_LINE, Assignment, parse
from runner.recipe.problems import nearest, show
from runner.recipe.schema import complete
from runner.recipe.sources import RECIPE, ROOT, Choice, Given, Repository, near, search, unknown_recipe
from runner.recipe.tree import Tree, dotted
from runner.recipe.validate import known_keys, may_be_removed, validate

#: Groups whose entries are independent of each other, so that choosing an option removes none of them.
_COLLECTIONS = ("hooks", "trackers")


__all__ = ["Composition", "compose", "dump", "nearest"]


@dataclass
class Composition:
    """A configuration, where each key of it comes from, and what is wrong."""

    config: dict[str, Any] = field(default_factory=dict)
    unresolved: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Mark] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    recipe: str | None = None
    layers: list[str] = field(default_factory=list)
    #: The chosen option of each group, the options that there are, and the folders that were searched.
    choices: dict[str, str | list[str] | None] = field(default_factory=dict)
    options: dict[str, list[str]] = field(default_factory=dict)
    folders: list[tuple[str, str]] = field(default_factory=list)
    directory: Path = field(default_factory=Path.cwd)
    #: Keys that are null because an interpolation could not be resolved.
    failed: set[str] = field(default_factory=set)
    #: Targets that a recipe from elsewhere chose: key -> name. To be confirmed once they can be imported.
    bound: dict[str, str] = field(default_factory=dict)

    def check(self, world: int = 1) -> list[Problem]:
        """All problems: those of composing, and those of the schema. Derived batch keys are filled in.

        `world` is the number of processes that train.
        """
        broken = {p.key for p in self.problems if p.key} | self.failed
        partial = any(p.key in (None, RECIPE, "defaults") for p in self.problems)
        found = validate(
            self.config,
            self.origins,
            options=self.options,
            directory=self.directory,
            partial=partial,
            skip=broken,
            world=world,
        )
        return [*self.problems, *(p.at(nearest(self.origins, p.key)) for p in found)]


def compose(
    overrides: Sequence[str], *, directory: Path | None = None, config_dirs: Sequence[Path] = ()
) -> Composition:
    """The configuration of a command line. The user's mistakes are in `problems`; none is raised."""
    version.setbase("1.3")
    setup_globals()  # the resolvers ${now:} and others that users of Hydra know
    composer = _Composer((directory or Path.cwd()).absolute(), config_dirs)
    return composer.run(overrides)


class _Composer:
    """One composition, step by step."""

    def __init__(self, directory: Path, config_dirs: Sequence[Path]) -> None:
        self.directory = directory
        self.folders = search(directory, config_dirs)
        self.repository = Repository(self.folders)
        self.tree = Tree()
        self.result = Composition(directory=directory, problems=self.repository.problems)
        self.result.notes = self.repository.notes
        self.problems = self.result.problems
        self.chosen: dict[str, Choice] = {}
        #: `+group@package=option`: package, group, choice.
        self.placed: list[tuple[str, str, Choice]] = []
        for given in config_dirs:
            if not os.path.isdir(directory / given):  # False also for what is no name
                problem = Problem(f"--config-dir {given}", "there is no such folder", "name one that exists")
                self.problems.append(problem.at(COMMAND_LINE))

    def run(self, overrides: Sequence[str]) -> Composition:
        assignments, problems = parse(overrides)
        self.problems += problems
        values = [a for a in assignments if not self._is_choice(a)]
        self._choose_recipe()
        for layer in self._layers():
            self._merge(layer)
        self._apply(values)
        self.tree.settle_exclusive()
        self.tree.settle_batch()
        return self._finish(overrides)

    # What is chosen

    def _is_choice(self, given: Assignment) -> bool:
        """Notes the choice of a group's option; what else an override may be is a value."""
        value = given.value
        is_list = isinstance(value, list) and all(isinstance(v, str) for v in value)
        is_name = value is None or is_list or (isinstance(value, str) and "${" not in value)
        if given.key != RECIPE and not (is_name and self.repository.offers(given.key)):
            return False
        if given.package is not None and given.key != RECIPE and not given.delete:
            self.placed.append((given.package, given.key, Choice(value, COMMAND_LINE)))
            return True
        if given.package is not None:
            return False
        if given.delete and value is not None:
            current = self.repository.root_groups.get(given.key)
            if current is None or current.value != value:
                why = f"{given.key} is not {value}, so it is not removed"
                self.problems.append(Problem(given.key, why, f"write `~{given.key}`", value, COMMAND_LINE))
                return True
        self.chosen[given.key] = Choice(None if given.delete else value, COMMAND_LINE)
        if isinstance(value, str) and given.key != RECIPE:
            self.chosen[given.key] = Choice(value.removesuffix(".yaml"), COMMAND_LINE)
        return True

    def _choose_recipe(self) -> None:
        choice = self.chosen.get(RECIPE)
        if choice is None or choice.value is None:
            self.chosen.pop(RECIPE, None)
            return
        name, options = choice.value, self.repository.options(RECIPE)
        if not isinstance(name, str) or not name:
            fix = "name one recipe; -m runs several, one after the other: -m +recipe=a,b"
            problem = Problem(RECIPE, "a run has one recipe", fix, name, COMMAND_LINE)
        elif re.search(r"[/\\]|^\.+$|\0", name):
            found = self._given(name, options)
            if isinstance(found, Given):
                self.folders.append(found)
                self.repository.sources.append(found)
                self.chosen[RECIPE] = Choice(found.name, COMMAND_LINE)
                self.result.recipe = found.name
                if found.foreign:
                    note = f"{name} comes from elsewhere: it builds what is listed as harmless, and what trust= adds"
                    self.result.notes.append(note)
                return
            problem = found
        elif name.removesuffix(".yaml") not in options:
            problem = unknown_recipe(name, options, COMMAND_LINE)
        else:
            name = name.removesuffix(".yaml")
            self.chosen[RECIPE] = Choice(name, COMMAND_LINE)
            self.result.recipe = name
            return
        self.problems.append(problem)
        del self.chosen[RECIPE]

    def _given(self, name: str, options: list[str]) -> Given | Problem:
        """The recipe that a path names."""
        path = self.directory / name
        fix = (
            f"write `+recipe={path.stem}`"
            if path.stem in options
            else "give the path of a file, or put it into ./recipes"
        )
        if path.suffix not in (".yaml", ".yml"):
            return Problem(RECIPE, "is not the path of a recipe: it does not end in .yaml", fix, name, COMMAND_LINE)
        try:
            if path.is_file():
                return Given(path, self.directory)
        except (OSError, ValueError, RuntimeError):
            pass  # a path that the system does not take
        return Problem(RECIPE, "there is no such file", fix, name, COMMAND_LINE)

    def _hydra_overrides(self) -> list[Override]:
        """The choices of the command line in Hydra's terms."""
        root = self.repository.root_groups
        found = []
        for group, choice in self.chosen.items():
            self.repository.ask(group, choice)
            kind = OverrideType.CHANGE if group in root else OverrideType.ADD
            if choice.value is None:
                if group not in root:
                    continue
                kind = OverrideType.DEL
            found.append(Override(kind, group, ValueType.ELEMENT, choice.value, input_line=group))
        for package, group, choice in self.placed:
            self.repository.ask(group, choice)
            found.append(Override(OverrideType.ADD, group, ValueType.ELEMENT, choice.value, package, group))
        return found

    def _layers(self) -> list[ResultDefault]:
        """The files to merge, in order, by Hydra's algorithm."""
        try:
            return create_defaults_list(
                self.repository, ROOT, self._hydra_overrides(), prepend_hydra=False, skip_missing=False
            ).defaults
        except RecursionError:
            why, fix = "files include each other in a circle", "remove one of the entries"
        except (HydraException, OmegaConfBaseException, ValueError, AssertionError) as error:
            why = str(error).strip().split("\n")[0] or "the defaults lists cannot be put together"
            fix = "see the defaults list of the recipe, and of the files that it names"
        recipe = self.repository.documents.get(f"{RECIPE}/{self.result.recipe}")
        mark = recipe.mark("defaults") if recipe and recipe.defaults else None
        self.problems.append(Problem("defaults", why, fix, mark=mark))
        return []

    # Merging

    def _merge(self, layer: ResultDefault) -> None:
        path = (layer.config_path or "").removesuffix(".yaml").lstrip("/")
        document = self.repository.documents.get(path)
        if document is None or not document.file:
            return
        self.tree.layer += 1
        self.result.layers.append(document.file)
        data = dict(document.data)
        if path.startswith(f"{RECIPE}/"):
            for group in [k for k in data if self._is_replaced(path, k, data[k])]:
                del data[group]
        package = layer.package or ""
        at: Keys = tuple(package.split(".")) if package and package != "_global_" else ()
        self.tree.merge(data, lambda keys: document.mark(*keys), at)

    def _is_replaced(self, recipe: str, group: Any, content: Any) -> bool:
        """Whether a later choice of another option replaces what a recipe says below a group."""
        if group not in self.repository.root_groups or group in _COLLECTIONS:
            return False
        recipes = [p for p in self.repository.choices if p.startswith(f"{RECIPE}/")]  # derived recipes come first
        before = recipes[: recipes.index(recipe)] if recipe in recipes else []
        later = [self.chosen[group]] if group in self.chosen else []
        later += [choices[group] for path in before if group in (choices := self.repository.choices[path])]
        if not later:
            return False
        own = self.repository.choices.get(recipe, {}).get(group, self.repository.root_groups[group])
        builds = isinstance(content, dict) and "_target_" in content
        if later[0].value == own.value and not builds:
            return False
        exists = all(self.repository.files(f"{group}/{option}") for option in later[0].options)
        if content is not None and later[0].mark == COMMAND_LINE and later[0].value is not None and exists:
            name = recipe.removeprefix(f"{RECIPE}/").removeprefix("path:")
            self.result.notes.append(
                f"{group}={show(later[0].value)} replaces what the recipe {name} says about {group}"
            )
        return True

    # The command line

    def _apply(self, values: list[Assignment]) -> None:
        self.tree.layer += 1
        for group, choice in self.chosen.items():
            if choice.value is None and group != RECIPE:
                self.tree.forget((group,))
                self.tree.put((group,), None, COMMAND_LINE)
        for given in values:
            if given.package is not None:
                why, fix = f"there is no group {given.key}", "`key@package=option` chooses an option of a group"
                self.problems.append(Problem(given.key, why, fix, given.value, COMMAND_LINE))
            elif given.delete:
                self._delete(given)
            else:
                self._set(given)

    def _set(self, given: Assignment) -> None:
        in_the_way = self.tree.put(self._typed(given.keys), given.value, COMMAND_LINE)
        if in_the_way is not None:
            value = self.tree.get(in_the_way)
            what = f"a list of {len(value)}" if isinstance(value, list) else show(value)
            why = f"{dotted(in_the_way)} is {what} and has no keys of its own"
            fix = f"positions count from 0 to {len(value) - 1}" if isinstance(value, list) else "set it as a whole"
            self.problems.append(Problem(given.key, why, fix, given.value, COMMAND_LINE))

    def _typed(self, keys: Keys) -> Keys:
        """Digits are positions in a list, and keys of a mapping as the file has them."""
        typed: list[str | int] = []
        for key in keys:
            above = self.tree.get(tuple(typed))
            is_text = isinstance(key, int) and not isinstance(above, list)
            if is_text and not (isinstance(above, dict) and key in above):
                key = str(key)
            typed.append(key)
        return tuple(typed)

    def _delete(self, given: Assignment) -> None:
        keys = self._typed(given.keys)
        there = self.tree.has(keys)
        value = self.tree.get(keys)
        if not there and not known_keys(keys):
            level = self.tree.get(keys[:-1])
            names = [str(k) for k in level] if isinstance(level, dict) else []
            fix = near(str(keys[-1]), names) or "leave it out"
            self.problems.append(Problem(given.key, "there is nothing to remove", fix.strip(), mark=COMMAND_LINE))
        elif given.has_value and value != given.value:
            why = f"{given.key} is {show(value)}, not {show(given.value)}, so it is not removed"
            self.problems.append(Problem(given.key, why, f"write `~{given.key}`", mark=COMMAND_LINE))
        elif known_keys(keys) and not may_be_removed(keys):
            why, fix = "it is required and cannot be removed", f"give it another value: {given.key}=…"
            self.problems.append(Problem(given.key, why, fix, mark=COMMAND_LINE))
        elif known_keys(keys):
            self.tree.put(keys, None, COMMAND_LINE)
        else:
            self.tree.remove(keys)

    # The result

    def _finish(self, overrides: Sequence[str]) -> Composition:
        result, repository = self.result, self.repository
        result.unresolved = complete(copy.deepcopy(self.tree.data))
        foreign = self._foreign()
        stopped = foreign.written(self._choices()) if foreign else set()
        result.config, problems, result.failed = resolve(result.unresolved, {p.key for p in self.problems}, stopped)
        if foreign:
            foreign.resolved(result.config)
            result.config["trust"], result.bound = foreign.granted, foreign.bound
            self.problems += foreign.problems
        self.problems += remote_code(result.config, self.tree, {p.key for p in self.problems})
        result.origins = {dotted(keys): mark for keys, mark in self.tree.marks.items()}
        result.origins.update(self._chosen_where())
        recipe = repository.documents.get(f"{RECIPE}/{result.recipe}")
        if recipe is not None:
            result.origins[""] = Mark(recipe.file)
        result.options = {group: repository.options(group) for group in repository.groups()}
        result.folders = [(folder.provider, str(folder.path)) for folder in self.folders]
        result.choices = {group: choice.value for group, choice in self._choices().items()}
        result.problems = _unique(p.at(nearest(result.origins, p.key)) for p in [*self.problems, *problems])
        if result.recipe is None and not any(p.key == RECIPE for p in result.problems):
            self._ask_for_recipe(result)
        return result

    def _foreign(self) -> Foreign | None:
        """What comes from elsewhere; None where all files are the user's own."""
        files = foreign_files(self.repository, self.chosen)
        if not files:
            return None
        names = granted(self.directory, self.tree, files, self.problems)
        return Foreign(files, self.tree, names, functools.cache(lambda: built_in_targets(self.repository)))

    def _chosen_where(self) -> dict[str, Mark]:
        """Of a group that an option's file fills: where the option was chosen, by command line or recipe."""
        files = {document.file for document in self.repository.documents.values()}
        root = self.repository.root_groups
        return {
            group: choice.mark
            for group, choice in self._choices().items()
            if (mark := self.tree.marks.get((group,))) is not None
            and mark.line is None
            and mark.file in files
            and choice is not root.get(group)
        }

    def _choices(self) -> dict[str, Choice]:
        """The choice of each group, the command line's before a recipe's before the root's."""
        found = dict(self.repository.root_groups)
        for path in reversed([p for p in self.repository.choices if p.startswith(f"{RECIPE}/")]):
            found.update(self.repository.choices[path])
        return {**found, **self.chosen}

    def _ask_for_recipe(self, result: Composition) -> None:
        """Without a recipe, a run needs everything on the command line; where little is there, say the one thing."""
        needed = ("model", "task", "optimizer", "data", "batch.global_size")
        given = [key for key in needed if self.tree.get(tuple(key.split("."))) is not None]
        if len(given) < 4:
            names = self.repository.options(RECIPE)
            fix = f"write `+recipe=NAME` with one of: {', '.join(names)} (`runner recipes` describes them)"
            result.problems.append(Problem(RECIPE, "no recipe is chosen", fix, mark=COMMAND_LINE))


def _unique(problems: Any) -> list[Problem]:
    found: dict[str, Problem] = {}
    for problem in problems:
        found.setdefault(f"{problem.key} {problem.why} {problem.mark}", problem)
    return list(found.values())


def dump(config: Mapping[str, Any]) -> str:
    """A configuration as YAML, as `--cfg job` shows it; reading it gives the same values."""
    return str(yaml.dump(dict(config), Dumper=get_omega_conf_dumper(), sort_keys=False, allow_unicode=True, width=100))
