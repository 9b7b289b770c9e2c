"""Recipes from elsewhere: which files are not the user's own, and all that such a file may not say.

The user's own are the built-in files, those below the working directory, plugins, and the command line. Everything
else is foreign: a recipe given by a path outside, a folder given by --config-dir outside, and what such a file chooses
among the user's own options, because it brings the arguments. Decided by the place where each value was written, so an
interpolation hides nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner import trust
from runner.errors import Mark, Problem
from runner.places import BUILTIN
from runner.recipe.document import Keys, read
from runner.recipe.interpolation import REFERENCE
from runner.recipe.overrides import COMMAND_LINE
from runner.recipe.redact import is_secret
from runner.recipe.schema import complete
from runner.recipe.sources import Choice, Repository
from runner.recipe.tree import Tree, dotted, leaves, mappings

#: In the working directory: `trust: [names]`, what recipes from elsewhere may build as well.
TRUST = Path("conf", "trust.yaml")

#: What says where a run reads and writes, and on which machines: not a recipe's from elsewhere.
_NOT_THEIRS = (
    ("run_dir",), ("resume",), ("resume_allow",), ("trust",), ("launch",), ("backend", "config_file")
)  # fmt: skip
_COMPILE = frozenset({"fullgraph", "dynamic", "scope", "mode", "recompile_limit", "isolate_recompiles", "backend"})
_COMPILERS = ("inductor", "eager", "aot_eager", "cudagraphs", None)
_OUTSIDE = re.compile(r"[/~\\]|[A-Za-z]:[/\\]|file:|(.*[/\\])?\.\.([/\\]|$)")
_WHO = "a recipe from elsewhere"


@dataclass
class Foreign:
    """What foreign files say in one composition."""

    files: set[str]
    tree: Tree
    #: What the user adds to the list, and what the options that come with the program build.
    granted: list[str]
    built_in: Callable[[], Collection[str]]
    problems: list[Problem] = field(default_factory=list)
    #: The targets that are bound to the list: key -> name.
    bound: dict[str, str] = field(default_factory=dict)

    # Before interpolations are resolved

    def written(self, choices: Mapping[str, Choice | None]) -> set[str]:
        """Refuses what foreign files say as they say it; the keys whose interpolations must not be resolved."""
        choice = choices.get("launch")
        if choice is not None and choice.mark.file in self.files and choice.value not in (None, "local"):
            self._no("launch", f"{_WHO} may not say where a run is launched", f"launch={choice.value}", choice.value)
        default = complete({})
        stopped = set()
        for keys, value in leaves(self.tree.data):
            if not self._is_theirs(keys):
                continue
            self._place(keys, value, default)
            if isinstance(value, str) and "${" in value and not self._plain_reference(keys, value):
                stopped.add(dotted(keys))
        return stopped

    def _place(self, keys: Keys, value: Any, default: Mapping[str, Any]) -> None:
        for start in _NOT_THEIRS:
            if keys[: len(start)] != start:
                continue
            usual: Any = default
            for key in keys:
                usual = usual.get(key) if isinstance(usual, dict) else None
            if value is not None and value != usual:
                what = "allow itself anything" if start == ("trust",) else f"set {dotted(start)}"
                self._no(keys, f"{_WHO} may not {what}", f"give it yourself: {dotted(keys)}=…", value)

    def _plain_reference(self, keys: Keys, text: str) -> bool:
        """Whether a text refers to keys only, none of them secret; a target must not refer at all."""
        if keys[-1] == "_target_":
            self._no(keys, f"{_WHO} writes out what it builds", "write module.Name", text)
        elif "${" in REFERENCE.sub("", text):
            why = f"{_WHO} may refer to other keys, and to nothing else (no environment, no functions)"
            self._no(keys, why, f"write the value, or give it yourself: {dotted(keys)}=…", text)
        elif any(is_secret(path) for _, path in REFERENCE.findall(text)):
            self._no(keys, f"{_WHO} may not refer to a secret", f"give it yourself: {dotted(keys)}=…", text)
        else:
            return True
        return False

    # Afterwards

    def resolved(self, config: Mapping[str, Any]) -> None:
        """Refuses what foreign files have built, wherever it came to stand."""
        for keys, node in mappings(config):
            for name in trust.CODE_ARGUMENTS & node.keys():
                if node[name] not in (None, False) and not self._is_free((*keys, name)):
                    self._no((*keys, name), f"{_WHO} may not ask for code to be loaded", "remove it", node[name])
            kernels = node.get("attn_implementation")
            mine = self._is_free((*keys, "attn_implementation"))
            if isinstance(kernels, str) and not kernels.isidentifier() and not mine:
                self._no((*keys, "attn_implementation"), f"{_WHO} may not load kernels from a hub", "", kernels)
            if "_target_" in node and not self._may_build_anything(keys):
                self._target(keys, node)
        for keys, value in leaves(config):
            told = keys[0] in ("run_dir", "resume") or keys[-1] == "_target_"
            if isinstance(value, str) and not told and self._is_theirs(keys) and _OUTSIDE.match(value):
                why = f"{_WHO} may not name files outside of the working directory"
                self._no(keys, why, f"give it yourself: {dotted(keys)}=…", value)
        self._compile(config.get("compile"))

    def _target(self, keys: Keys, node: Mapping[str, Any]) -> None:
        name, key = node["_target_"], dotted((*keys, "_target_"))
        if name is None or any(problem.key == key for problem in self.problems):
            return  # complained about already
        allowed = trust.allows(name, self.granted)
        if not allowed and name in self.built_in():
            return
        if not allowed:
            self._no(key, f"{_WHO} may not build it", trust.advice(name), name)
            return
        self.bound[key] = name
        if name not in self.granted:
            self.problems += trust.arguments(node, dotted(keys))

    def _compile(self, options: Any) -> None:
        if not isinstance(options, dict):
            return
        for name, value in options.items():
            fine = name in _COMPILE and (name != "backend" or value in _COMPILERS)
            if not fine and not self._is_free(("compile", name)):
                why = f"{_WHO} may not choose what compiles, nor its options"
                self._no(("compile", name), why, f"give it yourself: compile.{name}=…", value)

    # Who wrote it

    def _is_theirs(self, keys: Keys) -> bool:
        mark = self.tree.marks.get(keys)
        return mark is not None and mark.file in self.files

    def _is_free(self, keys: Keys) -> bool:
        """Whether a value stands where the user's own file or word put it, and refers to nothing."""
        value = self.tree.get(keys)
        refers = isinstance(value, str) and "${" in value
        return self.tree.has(keys) and keys in self.tree.marks and not refers and not self._is_theirs(keys)

    def _may_build_anything(self, keys: Keys) -> bool:
        """Whether the user chose what is built here, and, where a file says so, what it is called with."""
        target = (*keys, "_target_")
        if not self._is_free(target):
            return False
        below = (mark for place, mark in self.tree.marks.items() if place[: len(keys)] == keys)
        return self.tree.marks[target] == COMMAND_LINE or not any(mark.file in self.files for mark in below)

    def _no(self, keys: Keys | str, why: str, fix: str, value: Any) -> None:
        key = keys if isinstance(keys, str) else dotted(keys)
        mark = None if isinstance(keys, str) else self.tree.marks.get(keys)
        self.problems.append(Problem(key, why, fix, value).at(mark))


def foreign_files(repository: Repository, chosen: Mapping[str, Choice]) -> set[str]:
    """The files that are foreign, or of the user's own and chosen by one that is."""
    found = {document.file for path, document in repository.documents.items() if path in repository.foreign}
    grown = bool(found)
    while grown:
        grown = False
        for path, document in repository.documents.items():
            asked = repository.asked.get(path)
            if not document.file or document.file in found or asked is None or asked[2].file not in found:
                continue
            group, option, _ = asked
            by_hand = group in chosen and option in chosen[group].options
            if not by_hand and not Path(document.file).resolve().is_relative_to(BUILTIN):
                found.add(document.file)
                grown = True
    return found


def granted(directory: Path, tree: Tree, files: set[str], problems: list[Problem]) -> list[str]:
    """The names that the user adds to the list, in conf/trust.yaml and by the key `trust`; not what `files` add."""
    value = tree.get(("trust",))
    marks: dict[str, Mark | None] = {}
    for position, name in enumerate(value if isinstance(value, list) else []):
        mark = tree.marks.get(("trust", position))
        if isinstance(name, str) and mark is not None and mark.file not in files:
            marks[name] = mark
    if (directory / TRUST).is_file():
        document = read(directory / TRUST)
        problems += document.problems
        names = document.data.get("trust")
        if not isinstance(names, list) or len(document.data) != 1:
            why, fix = "the file says what to trust, and nothing else", "write `trust: [package.module.Name]`"
            problems.append(Problem("trust", why, fix, mark=Mark(document.file)))
            names = []
        for position, name in enumerate(names):
            marks.setdefault(str(name), document.mark("trust", position))
    for name, mark in marks.items():
        if not trust.is_grant(name):
            why, fix = "is no name that can be trusted", "write package.module.Name, or package.* for all of a package"
            problems.append(Problem("trust", why, fix, name).at(mark))
    return [name for name in marks if trust.is_grant(name)]


def built_in_targets(repository: Repository) -> set[str]:
    """What the options that come with the program build: they are made to be chosen."""
    found = set()
    for folder in repository.folders():
        if not folder.group and Path(folder.path).resolve().is_relative_to(BUILTIN):
            for file in Path(folder.path).glob("*/*.yaml"):
                targets = (value for keys, value in leaves(read(file).data) if keys[-1:] == ("_target_",))
                found |= {target for target in targets if isinstance(target, str)}
    return found


def remote_code(config: Mapping[str, Any], tree: Tree, told: Collection[str | None]) -> list[Problem]:
    """Of any file: a request to run code that comes with a model or a data set. The command line may ask for it.

    Keys that are `told` have been complained about already.
    """
    problems = []
    for keys, node in mappings(config):
        value, place = node.get("trust_remote_code"), (*keys, "trust_remote_code")
        mark = tree.marks.get(place)
        by_hand = mark == COMMAND_LINE and "${" not in str(tree.get(place))
        if value not in (None, False) and not by_hand and dotted(place) not in told:
            why = "code that comes with a model or data set is not run because a file says so"
            problems.append(Problem(dotted(place), why, "remove it", value).at(mark))
        target = node.get("_target_")
        if target in ("datasets.load_dataset", "datasets.load_dataset_builder", "datasets.load.load_dataset"):
            first = node.get("_args_")
            path = node.get("path", first[0] if isinstance(first, list) and first else None)
            if isinstance(path, str) and path.endswith(".py"):
                why = "data sets with a loading script of their own are not loaded: the script would be run"
                fix = "save it once by save_to_disk, or as files that need no script"
                problems.append(Problem(dotted((*keys, "path")), why, fix, path).at(tree.marks.get((*keys, "path"))))
    return problems
