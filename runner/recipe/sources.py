"""The folders that configuration and recipes come from, as lazy sources for Hydra's defaults-list algorithm."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra.core.default_element import ConfigDefault, GroupDefault, InputDefault
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

from runner.errors import Mark, Problem
from runner.places import BUILTIN, plugin_folders
from runner.recipe.document import Document, comments, read
from runner.recipe.schema import Config, Specs, keys_of

#: The root configuration's name, and the group that the flat folders recipes/ are offered as.
ROOT = "runner"
RECIPE = "recipe"

#: Entries of one defaults list, and options chosen at once: Hydra's algorithm takes its time for each.
MAX_DEFAULTS = 64

#: The newest format of recipes that is read.
FORMAT = 1


class Folder(ConfigSource):
    """A folder of YAML files; with `group`, a flat one that is offered as that group.

    `foreign`: it is not the user's own, so that its files may not build just anything.
    """

    def __init__(self, provider: str, path: Path, group: str = "", foreign: bool = False) -> None:
        super().__init__(provider, f"{self.scheme()}://{path}")
        self.group = group
        self.foreign = foreign

    @staticmethod
    def scheme() -> str:
        return "runner"

    def available(self) -> bool:
        return os.path.isdir(self.path)

    def file(self, config_path: str) -> Path | None:
        """The file of a group's option, such as optimizer/adamw; None where there is none."""
        parts = config_path.removesuffix(".yaml").split("/")
        if self.group:
            if parts[0] != self.group or len(parts) != 2:
                return None
            parts = parts[1:]
        if any(part in ("", ".", "..") for part in parts):
            return None
        path = os.path.join(self.path, *parts) + ".yaml"
        return Path(path) if os.path.isfile(path) else None

    def is_config(self, config_path: str) -> bool:
        return self.file(config_path) is not None

    def is_group(self, config_path: str) -> bool:
        if self.group:
            return config_path == self.group and self.available()
        if any(part in (".", "..", "recipes", "__pycache__") for part in config_path.split("/")):
            return False
        return config_path == "" or (config_path[0] != "/" and os.path.isdir(os.path.join(self.path, config_path)))

    def list(self, config_path: str, results_filter: ObjectType | None = None) -> list[str]:
        if self.group and config_path == "":
            return [self.group] if results_filter in (None, ObjectType.GROUP) else []
        if not self.is_group(config_path):
            return []
        with os.scandir(self.path if self.group else os.path.join(self.path, config_path)) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith((".", "_")))
        below = f"{config_path}/" if config_path else ""
        configs = [n[: -len(".yaml")] for n in names if n.endswith(".yaml") and self.is_config(below + n)]
        groups = [n for n in names if not self.group and self.is_group(below + n)]
        wanted = {ObjectType.CONFIG: configs, ObjectType.GROUP: groups}
        return sorted({*configs, *groups} if results_filter is None else wanted[results_filter])

    def load_config(self, config_path: str) -> ConfigResult:
        raise NotImplementedError("the repository reads the file, to keep its marks")


class Given(Folder):
    """One recipe that was given by its path, offered under a name that no file in a folder has."""

    def __init__(self, path: Path, directory: Path) -> None:
        super().__init__(str(path), path.parent, RECIPE, is_foreign(path, directory))
        self.recipe = path
        self.name = f"path:{path.stem}"

    def file(self, config_path: str) -> Path | None:
        return self.recipe if config_path == f"{RECIPE}/{self.name}" else None

    def list(self, config_path: str, results_filter: ObjectType | None = None) -> list[str]:
        return []


def is_foreign(path: Path, directory: Path) -> bool:
    """Whether a path that the user gave leads out of the working directory, links followed."""
    real = path.resolve()
    return not any(real.is_relative_to(own.resolve()) for own in (directory, BUILTIN / "conf", BUILTIN / "recipes"))


def search(directory: Path, config_dirs: Iterable[Path] = ()) -> list[Folder]:
    """All folders with configuration, the first that has a file wins: the user's own, then the built-in ones."""
    in_checkout = directory.resolve() == BUILTIN.resolve()
    folders = [
        ("built-in" if in_checkout else "./conf", directory / "conf", "", False),
        ("built-in" if in_checkout else "./recipes", directory / "recipes", RECIPE, False),
    ]
    for given in config_dirs:
        path = directory / given
        outside = is_foreign(path, directory)
        folders += [(str(given), path, "", outside), (f"{given}/recipes", path / "recipes", RECIPE, outside)]
    for plugin in [*plugin_folders(directory), *installed_plugins()]:
        folders.append((f"plugin {plugin.name}", plugin / "conf", "", False))
    folders += [("built-in", BUILTIN / "conf", "", False), ("built-in", BUILTIN / "recipes", RECIPE, False)]
    seen: dict[tuple[str, str], Folder] = {}
    for provider, path, group, outside in folders:
        if os.path.isdir(path):  # False also for what is no name
            seen.setdefault((os.path.realpath(path), group), Folder(provider, path, group, outside))
    return list(seen.values())


@functools.cache
def installed_plugins() -> tuple[Path, ...]:
    """The folders of packages that declare an entry point in the group `runner.plugins`; none is imported.

    importlib.metadata would answer the same, 25 ms later.
    """
    found: dict[Path, None] = {}
    for place in sys.path:
        try:
            names = sorted(n for n in os.listdir(place or ".") if n.endswith((".dist-info", ".egg-info")))
        except OSError:
            continue
        for name in names:
            for package in _entries(Path(place or ".", name, "entry_points.txt")):
                try:
                    spec = importlib.util.find_spec(package)
                except (ImportError, ValueError, AttributeError):
                    continue
                for folder in (spec.submodule_search_locations or []) if spec else []:
                    found.setdefault(Path(folder))
    return tuple(found)


def _entries(file: Path) -> list[str]:
    """The top-level packages that an entry_points.txt names in the group `runner.plugins`."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    _, _, section = text.partition("[runner.plugins]")
    lines = section.split("\n[")[0].splitlines()
    targets = [line.partition("=")[2].partition(":")[0].strip() for line in lines if "=" in line]
    return [target.partition(".")[0] for target in targets if target]


@dataclass(frozen=True)
class Choice:
    """An option (or a list of options, or none) chosen for a group, and where."""

    value: str | list[str] | None
    mark: Mark

    @property
    def options(self) -> list[str]:
        return [self.value] if isinstance(self.value, str) else list(self.value or [])


class Repository(ConfigRepository):
    """Finds and reads files for Hydra's algorithm; notes what is wrong instead of stopping at the first."""

    def __init__(self, folders: Sequence[Folder]) -> None:
        self.sources = list(folders)
        self.documents: dict[str, Document] = {}
        #: Config paths of the documents that are not the user's own.
        self.foreign: set[str] = set()
        self.results: dict[str, ConfigResult | None] = {}
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        #: What was asked for, and where: config path -> group, option, mark.
        self.asked: dict[str, tuple[str, str, Mark]] = {}
        self.optional: set[str] = set()
        #: What a recipe chooses: config path of the recipe -> group -> choice.
        self.choices: dict[str, dict[str, Choice]] = {}
        self.root_groups: dict[str, Choice] = {}
        self.load_config(ROOT)

    def options(self, group: str) -> list[str]:
        return self.get_group_options(group)

    def groups(self) -> list[str]:
        """The names of all groups at the top, without `recipe`."""
        names = {name for folder in self.sources for name in folder.list("", ObjectType.GROUP)}
        return sorted(name for name in names - {RECIPE} if self.offers(name) and self.options(name))

    def offers(self, key: str) -> bool:
        """Whether a key chooses an option of a group. A folder called seed/ does not make the number a group."""
        known = keys_of(Config).get(key)
        is_value = known is not None and known.section is None and not known.builds and known.kinds != (Specs,)
        return not is_value and self.group_exists(key)

    def folders(self) -> list[Folder]:
        return [folder for folder in self.sources if isinstance(folder, Folder)]

    def files(self, config_path: str) -> list[tuple[Folder, Path]]:
        """Every file of that path, the one that wins first."""
        found = [(folder, folder.file(config_path)) for folder in self.folders()]
        return [(folder, path) for folder, path in found if path is not None]

    def load_config(self, config_path: str) -> ConfigResult | None:
        config_path = config_path.removesuffix(".yaml").lstrip("/")
        if config_path not in self.results:
            self.results[config_path] = None  # a file may ask for itself while its defaults are read
            self.results[config_path] = self._load(config_path)
        return self.results[config_path]

    def config_exists(self, config_path: str) -> bool:
        return True  # load_config notes what is missing

    def _load(self, config_path: str) -> ConfigResult | None:
        files = self.files(config_path)
        if not files and (config_path in self.optional or config_path not in self.asked):
            return None  # Hydra also asks for the option None of a group of which nothing is chosen
        if not files:
            if len(self.problems) < 100:  # advice takes time
                self.problems.append(self.missing(config_path))
            document, defaults = Document(""), []
        else:
            is_recipe = config_path.startswith(f"{RECIPE}/")
            if files[0][0].foreign:
                self.foreign.add(config_path)
            document = read(files[0][1], may_be_empty=not is_recipe)
            self.problems += document.problems
            self._note_shadowed(config_path, files)
            if is_recipe and document.package is None:
                document.package = "_global_"  # without it a recipe would have no effect
            self._refuse_hydra(document)
            if is_recipe:
                self._refuse_newer(document)
            chosen = self._choices(document) if is_recipe or config_path == ROOT else {}
            defaults = self._defaults(config_path, document, chosen)
        self.documents[config_path] = document
        return ConfigResult(
            provider=files[0][0].provider if files else "",
            path=document.file,
            config=OmegaConf.create({}),
            header={"package": document.package},
            defaults_list=defaults,
        )

    def missing(self, config_path: str) -> Problem:
        """An option that does not exist, with those that do."""
        group, name, mark = self.asked[config_path]
        if group == RECIPE:
            return unknown_recipe(name, self.options(RECIPE), mark)
        options = self.options(group) if group else []
        if not options:
            why = f"there is no configuration group {group}" if group else f"there is no file {name}.yaml in conf/"
            return Problem(group or name, why, near(group, self.groups()), name, mark)
        fix = f"{near(name, options)}options: {', '.join(options)}"
        if not name:
            return Problem(group, f"no {group} is named", fix, name, mark)
        if "." in name and "/" not in name:
            fix = f"to build {name} itself, write `{group}: {{_target_: {name}}}`; {fix}"
        return Problem(group.replace("/", "."), f"{group} has no option {name}", fix, name, mark)

    def _note_shadowed(self, config_path: str, files: list[tuple[Folder, Path]]) -> None:
        if len(files) < 2:
            return
        group, _, name = config_path.rpartition("/")
        (folder, path), (other, _) = files[0], files[1]
        what = f"{group} {name}" if group else "the root configuration"
        own = folder.provider.startswith("./")
        shown = f"{folder.provider}/{path.relative_to(folder.path)}" if own else str(path)
        replaced = "the built-in one" if other.provider == "built-in" else f"the one of {other.provider}"
        self.notes.append(f"{what} is {shown}, which replaces {replaced}")

    def _refuse_hydra(self, document: Document) -> None:
        if "hydra" in document.data:
            why = "Hydra's own settings have no effect here"
            value = document.data.pop("hydra")
            fix = "remove the section; `run_dir` says where a run writes"
            self.problems.append(Problem("hydra", why, fix, value, document.mark("hydra")))

    def _refuse_newer(self, document: Document) -> None:
        """A recipe may say which `format` it is written in; of a newer one nothing else can be said."""
        if "format" not in document.data:
            return
        mark, given = document.mark("format"), document.data.pop("format")
        if type(given) is int and 1 <= given <= FORMAT:
            return
        if type(given) is int and given > FORMAT:
            why, fix = f"the recipe is of format {given}, and this program reads {FORMAT}", "install a newer runner"
            document.data, document.defaults = {}, []
            self.problems.append(Problem(None, why, fix, mark=mark))
        else:
            fix = f"write `format: {FORMAT}`, or leave it out"
            self.problems.append(Problem("format", "is no format of recipes", fix, given, mark))

    def _choices(self, document: Document) -> dict[str, Choice]:
        """Takes the beginner's form out of the data: `precision: bf16` chooses the option of a group."""
        chosen = {}
        for key in [k for k in document.data if isinstance(k, str) and self.offers(k) and k != RECIPE]:
            value = document.data[key]
            if value is None or isinstance(value, str):
                pass
            elif not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                continue
            if isinstance(value, list) and len(value) > MAX_DEFAULTS:
                why = f"chooses {len(value):,} options, more than {MAX_DEFAULTS}"
                self.problems.append(Problem(key, why, "name each once", mark=document.mark(key)))
                del document.data[key]
            elif not (isinstance(value, str) and ("${" in value or value == "???")):
                chosen[key] = Choice(value, document.mark(key))
                if value is not None:  # null also stays as the value, which removes what the schema would fill in
                    del document.data[key]
        return chosen

    def _defaults(self, config_path: str, document: Document, chosen: dict[str, Choice]) -> list[InputDefault]:
        """Hydra's form of the defaults list, with choices for the root's groups as overrides at its end."""
        own: list[InputDefault] = []
        for position, item in enumerate(document.defaults):
            mark = document.mark("defaults", position)
            if position >= MAX_DEFAULTS:
                why = f"the defaults list has {len(document.defaults):,} entries, more than {MAX_DEFAULTS}"
                self.problems.append(Problem("defaults", why, "divide it among several files", mark=mark))
                break
            entry = self._entry(item, mark, config_path)
            if not isinstance(entry, GroupDefault):
                own += [] if entry is None else [entry]
            elif self._is_hydra(entry, mark):
                continue
            elif config_path == ROOT:
                own.append(self._root_entry(entry, mark, chosen))
            elif self._is_root_group(entry) and config_path.startswith(f"{RECIPE}/"):
                self._choose(entry, mark, chosen, document)
            else:
                own.append(entry)
        self.choices[config_path] = chosen
        for name, choice in chosen.items():
            self._ask(name, choice)
            override = name in self.root_groups and config_path != ROOT
            own.append(GroupDefault(group=f"/{name}", value=choice.value, override=override))
        return sorted(own, key=lambda entry: entry.is_override())  # Hydra wants overrides last

    def _root_entry(self, entry: GroupDefault, mark: Mark, chosen: dict[str, Choice]) -> GroupDefault:
        """A group of the root; its value may stand below the list, in the beginner's form."""
        name = (entry.group or "").lstrip("/")
        choice = chosen.pop(name, Choice(entry.value, mark))
        self.root_groups[name] = choice
        return replace(entry, value=choice.value)

    def _is_root_group(self, entry: GroupDefault) -> bool:
        return (entry.group or "").lstrip("/") in self.root_groups and entry.package is None

    def _choose(self, entry: GroupDefault, mark: Mark, chosen: dict[str, Choice], document: Document) -> None:
        """`- model: mlp` in a recipe's defaults list means what `model: mlp` below it means."""
        name = (entry.group or "").lstrip("/")
        if name in chosen:
            why = f"{name} is chosen twice, also in line {chosen[name].mark.line}"
            self.problems.append(Problem(name, why, "remove one of the two", entry.value, mark))
        chosen.setdefault(name, Choice(entry.value, mark))
        if entry.value is None and name not in document.data:
            document.data[name] = None
            document.marks[name,] = mark

    def _entry(self, item: Any, mark: Mark, config_path: str) -> InputDefault | None:
        """One line of a defaults list."""
        here = config_path.rpartition("/")[0]
        if isinstance(item, str) and item.partition("@")[0].strip():
            path, _, package = item.partition("@")
            words = path.split()
            path = words[-1]
            full = path.lstrip("/") if path[0] == "/" or not here else f"{here}/{path}"
            group, _, name = full.rpartition("/")
            self.asked.setdefault(full, (group, name, mark))
            return ConfigDefault(path=path, package=package or None, optional="optional" in words[:-1])
        if isinstance(item, Mapping) and len(item) == 1:
            words_and_package, value = next(iter(item.items()))
            is_list = isinstance(value, list) and all(isinstance(v, str) for v in value)
            if isinstance(words_and_package, str) and (value is None or isinstance(value, str) or is_list):
                return self._group_entry(words_and_package, value, mark, here)
        fix = "write `- group: option`, `- override /group: option`, or the name of another file"
        self.problems.append(Problem("defaults", "this is no entry of a defaults list", fix, item, mark))
        return None

    def _group_entry(self, text: str, value: Any, mark: Mark, here: str) -> GroupDefault | None:
        words, _, package = text.partition("@")
        *keywords, group = words.split() or [""]
        if not group.strip("/") or not set(keywords) <= {"override", "optional"}:
            fix = "write `- group: option` or `- override /group: option`"
            self.problems.append(Problem("defaults", f"{text} is no group", fix, value, mark))
            return None
        name = group.lstrip("/")
        if here == RECIPE:
            group = f"/{name}"  # recipes are flat: nothing lies below them
        base = name if group.startswith("/") or not here else f"{here}/{name}"
        optional = "optional" in keywords
        self._ask(base, Choice(value, mark), optional)
        return GroupDefault(
            group=group, value=value, package=package or None, optional=optional, override="override" in keywords
        )

    def _ask(self, group: str, choice: Choice, optional: bool = False) -> None:
        for option in choice.options:
            self.asked[f"{group}/{option}"] = (group, option, choice.mark)
            if optional:
                self.optional.add(f"{group}/{option}")

    def ask(self, group: str, choice: Choice) -> None:
        """Notes a choice of the command line, so that a missing option is said to stand there."""
        self._ask(group, choice)

    def _is_hydra(self, entry: GroupDefault, mark: Mark) -> bool:
        if not (entry.group or "").lstrip("/").startswith("hydra"):
            return False
        why = "Hydra's own settings have no effect here"
        self.problems.append(Problem("defaults", why, "remove the line", entry.value, mark))
        return True


def near(name: str, known: Iterable[str]) -> str:
    """`did you mean …? ` where a known name is close, else nothing."""
    lower = {k.lower(): k for k in known if len(name) < 100}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f"did you mean {lower[close[0]]}? " if close else ""


def unknown_recipe(name: str, recipes: Sequence[str], mark: Mark | None = None) -> Problem:
    """A recipe that does not exist, with those that do."""
    there = f"recipes: {', '.join(recipes)}" if recipes else "there are none"
    fix = f"{near(name, recipes)}{there} (`runner recipes` describes them)"
    return Problem("recipe", f"there is no recipe called {name}", fix, name, mark)


@dataclass(frozen=True)
class Found:
    """A recipe that can be chosen."""

    name: str
    description: str
    provider: str
    file: Path
    replaces: str | None = None


def recipes(folders: Sequence[Folder]) -> list[Found]:
    """All recipes, by name; a user's own hides a built-in one."""
    found: dict[str, Found] = {}
    for folder in folders:
        for name in folder.list(RECIPE, ObjectType.CONFIG) if folder.group == RECIPE else []:
            path = folder.file(f"{RECIPE}/{name}")
            if path is None:
                continue
            if name in found:
                if found[name].replaces is None:
                    found[name] = replace(found[name], replaces=folder.provider)
                continue
            found[name] = Found(name, next(comments(path), ""), folder.provider, path)
    return [found[name] for name in sorted(found)]
