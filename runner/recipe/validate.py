"""Checks a composed configuration against the schema without importing what it builds: all problems at once."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.build import WORDS
from runner.errors import Mark, Problem
from runner.recipe.canonical import settle
from runner.recipe.init_from import problem_of_path, shape_problems
from runner.recipe.schema import Config, Data, Key, Specs, elsewhere, keys_of, variant, variants
from runner.recipe.tree import EXCLUSIVE, Keys, dotted, mappings

_LARGEST = 2**63 - 1
_ENOUGH = 100  # problems; more get no advice, which takes time
_DOTTED_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_EQUATION = "global_size = micro_size x accumulation.steps x processes"
_CONVERT = ("none", "partial", "object", "all")
_REQUIRED = {
    "model": "what is trained",
    "task": "what the loss is",
    "optimizer": "what moves the weights",
    "batch.global_size": "how many samples an optimizer step takes",
}


def validate(
    config: dict[str, Any],
    origins: Mapping[str, Mark],
    *,
    options: Mapping[str, list[str]] | None = None,
    directory: Path | None = None,
    partial: bool = False,
    skip: Collection[str] = (),
    world: int = 1,
) -> list[Problem]:
    """Everything that is wrong with a configuration; `batch.micro_size` and `accumulation.steps` are filled in.

    `world` is the number of processes that train.

    `options` are the groups' options, for advice. With `partial`, what is missing is not complained about.
    Keys in `skip` have been complained about already.
    """
    checker = _Checker(config, origins, options or {}, directory or Path.cwd(), skip, partial)
    checker.section(config, Config, ())
    checker.targets()
    checker.exclusive()
    checker.rollback()
    checker.weights()
    if not partial:
        checker.required()
    if config.get("determinism") != "canonical" or checker.canonical(world):
        checker.batch(world)
    return checker.problems


def known_keys(keys: Keys) -> Key | None:
    """The schema's key at a place, if there is one."""
    section: type | None = Config
    key: Key | None = None
    for name in keys:
        if section is None:
            return None
        key = keys_of(section).get(str(name))
        if key is None:
            return None
        section = key.section
    return key


def may_be_removed(keys: Keys) -> bool:
    """Whether `~key` means something for a key of the schema: null, none."""
    key = known_keys(keys)
    return key is not None and (key.optional or key.kinds == (Specs,)) and dotted(keys) not in _REQUIRED


def every_key(section: type = Config, above: str = "") -> Iterator[tuple[str, Key]]:
    """Every key of the schema with its dotted name."""
    for key in keys_of(section).values():
        yield f"{above}{key.name}", key
        if key.section is not None:
            yield from every_key(key.section, f"{above}{key.name}.")
            for kind in variants(key.section):
                yield from every_key(kind, f"{above}{key.name}.")


def plain(value: Any) -> str:
    """A value in a sentence."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


class _Checker:
    def __init__(
        self,
        config: dict[str, Any],
        origins: Mapping[str, Mark],
        options: Mapping[str, list[str]],
        directory: Path,
        skip: Collection[str],
        partial: bool,
    ) -> None:
        self.config = config
        self.origins = origins
        self.options = options
        self.directory = directory
        self.skip = skip
        self.partial = partial
        self.problems: list[Problem] = []

    def add(self, keys: Keys | str, why: str, fix: str = "", *value: Any, mark: Mark | None = None) -> None:
        name = keys if isinstance(keys, str) else dotted(keys)
        if name not in self.skip:
            self.problems.append(Problem(name, why, fix, *value).at(mark))

    def last(self, *names: str) -> Mark | None:
        """The last of the places of several keys; the command line comes after all files."""
        marks = [self.origins[name] for name in names if name in self.origins]
        return max(marks, key=lambda mark: math.inf if mark.line is None else mark.line, default=None)

    # Keys and types

    def section(self, values: dict[str, Any], section: type, at: Keys) -> None:
        keys = keys_of(variant(section, values))
        free = section is Data and "_target_" in values
        for name, value in values.items():
            if name in keys:
                self.value(value, keys[name], (*at, name), free)
            elif names := elsewhere(section, name):
                why = f"is an option of {dotted(at)}={' and '.join(names)}, and {dotted(at)} is {values.get('name')}"
                self.add((*at, name), why, f"{dotted(at)}={names[0]}, or leave {name} out", value)
            elif not free:
                self.unknown(name, value, keys, at)

    def unknown(self, name: Any, value: Any, keys: Mapping[str, Key], at: Keys) -> None:
        if dotted((*at, name)) in self.skip:
            return
        below: Keys = ()
        while isinstance(value, dict) and len(value) == 1 and self._was_typed((*at, name, *below)):
            below, value = (*below, *value), next(iter(value.values()))  # as it was typed: a.b.c=1
        self.add((*at, name, *below), "unknown key", self._what_was_meant(name, value, list(keys), at, below), value)

    def _was_typed(self, keys: Keys) -> bool:
        mark = self.origins.get(dotted(keys))
        return mark is not None and mark.line is None

    def _what_was_meant(self, name: Any, value: Any, here: list[str], at: Keys, below: Keys) -> str:
        if len(self.problems) > _ENOUGH:
            return ""
        every = [full for full, _ in every_key()]
        close = difflib.get_close_matches(str(name), here, n=1, cutoff=0.6)
        full = difflib.get_close_matches(dotted((*at, name, *below)), every, n=1, cutoff=0.75)
        last = str((name, *below)[-1])
        elsewhere = [key for key in every if key.rpartition(".")[2] == last and "." in key]
        first, dot, rest = str(name).partition(".")
        if close and not (dot and first in here):
            return f"did you mean {dotted((*at, close[0], *below))}?"
        if dot:
            return f"write it nested: `{first}:`, and below it, indented, `{rest}: {plain(value)}`"
        inside = [f"{key}.{name}" for key, spec in self.config.items() if isinstance(spec, dict) and name in spec]
        if not at and inside:
            return f"did you mean {inside[0]}?"
        if full or elsewhere:
            return f"did you mean {(full or elsewhere)[0]}?"
        if at == ("data",):
            return f"keys of data: {', '.join(here)}; with data._target_, what it takes may stand here too"
        return f"keys of {dotted(at)}: {', '.join(here)}" if at else "`--help` lists the keys"

    def value(self, value: Any, key: Key, keys: Keys, free: bool = False) -> None:
        if keys[0] == "data" and keys[1:2] in (("train",), ("eval",)):
            if value is not None and not free:
                self.spec(value, keys, "data")
        elif value is None:
            if not key.optional and key.kinds != (Specs,):
                self.add(keys, f"must be {describe(key)}, not null", self._default(key), None)
        elif key.section is not None:
            if isinstance(value, dict):
                self.section(value, key.section, keys)
            else:
                self.no_section(value, key, keys)
        elif key.builds:
            self.spec(value, keys, key.name)
        elif key.kinds == (Specs,):
            self.specs(value, keys)
        elif list[str] in key.kinds:
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                self.add(keys, "must be a list of texts", f"write {dotted(keys)}=[a,b]", value)
        elif key.kinds == (Any,):
            self.spec(value, keys, key.name)
        elif isinstance(value, dict) and dict[str, Any] in key.kinds:
            pass  # options of somebody else's, checked where they are used
        elif not matches(value, key):
            self.add(keys, f"must be {describe(key)}", advice(value, key, keys) or self._default(key), value)
        elif keys == ("name",) and not re.fullmatch(r"[\w][\w .+=-]{0,99}", value):
            self.add(keys, "must be letters, digits and . _ - only: it becomes part of a folder's name", "", value)
        elif key.kinds[0] is str and isinstance(value, str) and (not value.strip() or "\0" in value):
            self.add(keys, "must not be empty", self._default(key), value)

    def no_section(self, value: Any, key: Key, keys: Keys) -> None:
        section = key.section
        assert section is not None
        names = ", ".join(keys_of(section))
        group = self.options.get(str(keys[0])) if len(keys) == 1 else None
        if group:
            fix = f"name an option ({', '.join(group)}), or write keys below it: {names}"
        elif key.name == "every":
            fix = "write {steps: N}, {epochs: N}, {seconds: N}, or null for only the last"
        else:
            fix = f"its keys are {names}"
        self.add(keys, f"must be a section, not {plain(value)}", fix, value)

    def _default(self, key: Key) -> str:
        default = key.default
        return "" if default is None or isinstance(default, (dict, list)) else f"the default is {plain(default)}"

    # What to build

    def specs(self, value: Any, keys: Keys) -> None:
        if not isinstance(value, dict):
            group = self.options.get(str(keys[0]), [])
            fix = f"options: {', '.join(group)}; several: {dotted(keys)}=[a,b]" if group else ""
            self.add(keys, f"must be a mapping: name -> what to build, not {plain(value)}", fix, value)
            return
        for name, entry in value.items():
            if entry is not None:
                self.spec(entry, (*keys, name), str(keys[0]))

    def spec(self, value: Any, keys: Keys, group: str) -> None:
        options = self.options.get(group, [])
        if not isinstance(value, dict):
            self.add(keys, "must say what to build", self._how_to_build(value, keys, group, options), value)
        elif "_target_" not in value and keys[0] not in self.skip and not self.partial:
            self.add(keys, "does not say what to build: it has no `_target_`", self._missing(keys, group, options))
        if keys == ("optimizer",) and isinstance(value, dict):
            self.learning_rate(value)

    def _how_to_build(self, value: Any, keys: Keys, group: str, options: list[str]) -> str:
        if isinstance(value, str) and _DOTTED_NAME.fullmatch(value):
            return f"write `{keys[-1]}: {{_target_: {value}}}`"
        if len(keys) == 1 and options:
            return f"name an option ({', '.join(options)}), or write a mapping with `_target_`"
        return "write a mapping with `_target_: module.Name` and its arguments"

    def _missing(self, keys: Keys, group: str, options: list[str]) -> str:
        if group in ("hooks", "trackers") and keys[-1] in options:
            return f"choose it as well: {group}=[default,{keys[-1]}]"
        there = [str(key) for key in self.config.get(group) or {}]
        close = difflib.get_close_matches(str(keys[-1]), there, n=2, cutoff=0.7)
        others = [name for name in close if name != keys[-1]]
        if others and len(keys) > 1:
            return f"did you mean {dotted((*keys[:-1], others[0]))}?"
        if len(keys) == 1 and options:
            return f"choose an option ({', '.join(options)}), or add `_target_: module.Name`"
        return "add `_target_: module.Name`"

    def learning_rate(self, spec: Mapping[str, Any]) -> None:
        if "lr" not in spec or spec["lr"] is None:
            return
        lr = spec["lr"]
        if not _is_number(lr) or not math.isfinite(lr) or lr < 0:
            self.add(("optimizer", "lr"), "must be a number, at least 0", "for example 1e-3", lr)

    def targets(self) -> None:
        """Every `_target_` at any depth: a dotted name in a package that is there."""
        for keys, mapping in mappings(self.config):
            if "_target_" in mapping:
                self.target(mapping, keys)

    def target(self, spec: Mapping[str, Any], keys: Keys) -> None:
        name = spec["_target_"]
        if not isinstance(name, str) or not _DOTTED_NAME.fullmatch(name):
            if name is not None or (*keys, "_target_") != ("data", "_target_"):
                fix = "for example torch.nn.Linear" if name != "???" else "give it"
                self.add((*keys, "_target_"), "must be a dotted name, module.Name", fix, name)
        else:
            self.package(name, (*keys, "_target_"))
        self.builder_words(spec, keys)

    def package(self, name: str, keys: Keys) -> None:
        first = name.partition(".")[0]
        if first == "plugins" or first in sys.modules or first in sys.builtin_module_names:
            return
        own = (self.directory / first, self.directory / f"{first}.py")
        if len(first) < 200 and (own[0].is_dir() or own[1].is_file() or _is_installed(first)):
            return
        close = difflib.get_close_matches(first, ("torch", "runner", "plugins", "transformers"), n=1, cutoff=0.7)
        if close and close[0] != first:
            fix = f"did you mean {close[0]}{name[len(first) :]}?"
        else:
            fix = f"install it: pip install {first}"
        self.add(keys, f"there is no package {first} installed", fix, name)

    def builder_words(self, spec: Mapping[str, Any], keys: Keys) -> None:
        for word, value in spec.items():
            if not (isinstance(word, str) and len(word) > 2 and word[0] == word[-1] == "_" and word[1] != "_"):
                continue
            if word not in WORDS:
                close = difflib.get_close_matches(word, WORDS, n=1)
                known = ", ".join(sorted(WORDS))
                fix = f"did you mean {close[0]}?" if close else f"there are {known}"
                self.add((*keys, word), "no word of the builder", fix, value)
            elif word in ("_partial_", "_recursive_") and not isinstance(value, bool):
                self.add((*keys, word), "must be true or false", "", value)
            elif word == "_args_" and not isinstance(value, list):
                self.add((*keys, word), "must be a list of positional arguments", "", value)
            elif word == "_convert_" and value not in _CONVERT:
                self.add((*keys, word), f"must be one of {', '.join(_CONVERT)}", "", value)

    # What depends on several keys

    def required(self) -> None:
        for name, what in _REQUIRED.items():
            section, _, key = name.partition(".")
            value = self.config.get(section)
            if key:
                value = value.get(key) if isinstance(value, dict) else 0
            if value is None and not any(p.key == name for p in self.problems):
                self.add(name, f"is missing: {what}", self._choose(section))
        data = self.config.get("data")
        told = "data" in self.skip or any(p.key and p.key.startswith("data") for p in self.problems)
        if not told and isinstance(data, dict) and data.get("_target_", data.get("train")) is None:
            self.add("data.train", "is missing: what is trained on", self._choose("data"))

    def _choose(self, group: str) -> str:
        options = self.options.get(group)
        if group == "batch":
            return "give it in the recipe, or batch.global_size=32"
        if not options:
            return f"write `{group}: {{_target_: module.Name}}`"
        return f"name an option ({', '.join(options)}), or write a mapping with `_target_`"

    def exclusive(self) -> None:
        for section, names in EXCLUSIVE:
            values: Any = self.config
            for key in section:
                values = values.get(key) if isinstance(values, dict) else None
            if not isinstance(values, dict):
                continue
            given = [name for name in names if values.get(name) is not None]
            listed = " or ".join(dotted((*section, name)) for name in names)
            if len(given) > 1:
                places = " and ".join(f"{name} ({self._place(dotted((*section, name)))})" for name in given)
                mark = self.last(*(dotted((*section, name)) for name in given))
                self.add(
                    section, f"exactly one of {listed} may be given, not {places}", "remove all but one", mark=mark
                )
            elif not given and not self.partial and not any(dotted((*section, n)) in self.skip for n in names):
                examples = {"train": "train.epochs=3"}.get(dotted(section), f"{dotted(section)}={{steps: 100}}")
                self.add(section, f"exactly one of {listed} must be given", f"for example {examples}")

    def rollback(self) -> None:
        if self.config.get("nan") == "rollback" and self.config.get("checkpoint", {}) is None:
            fix = "checkpoint=default, or nan=skip or nan=stop"
            mark = self.last("nan", "checkpoint")
            why = "goes back to a checkpoint, and with checkpoint=none there is none"
            self.add("nan", why, fix, "rollback", mark=mark)

    def _place(self, key: str) -> str:
        mark = self.origins.get(key)
        if mark is None:
            return "default"
        return "command line" if mark.line is None else f"line {mark.line}"

    def canonical(self, world: int) -> bool:
        """Whether determinism=canonical can be had; what it decides is filled in."""
        found = list(settle(self.config, world))
        for name, *told in found:
            self.add(name, *told)
        return not found

    def weights(self) -> None:
        """`init_from`: its own keys, and that a path is there, unless the run goes on and does not look at it."""
        value = self.config.get("init_from")
        if value is None or not isinstance(value, (str, dict)) or any(p.key == "init_from" for p in self.problems):
            return
        problems = list(shape_problems(value))
        if not problems and not self._goes_on():
            problems = [problem] if (problem := problem_of_path(value, self.directory)) is not None else []
        self.problems += [p for p in problems if p.key not in self.skip]

    def _goes_on(self) -> bool:
        resume, run_dir = self.config.get("resume"), self.config.get("run_dir")
        if resume not in ("auto", "never"):
            return True
        there = self.directory / run_dir / "checkpoints" if isinstance(run_dir, str) else None
        return resume == "auto" and there is not None and os.path.isdir(there) and any(there.glob("step_*"))

    def batch(self, world: int) -> None:
        """global_size = micro_size x accumulation.steps x processes; what is not given is derived."""
        batch, accumulation = self.config.get("batch"), self.config.get("accumulation")
        if not isinstance(batch, dict) or not isinstance(accumulation, dict):
            return
        size, micro, steps = batch.get("global_size"), batch.get("micro_size"), accumulation.get("steps")
        searched = micro == "auto"
        micro = None if searched else micro
        if any(v is not None and (type(v) is not int or v < 1) for v in (size, micro, steps)) or size is None:
            return
        if searched and steps is not None:
            fix = "leave accumulation.steps out: it follows"
            self.add("accumulation.steps", "is given, and batch.micro_size=auto decides it", fix, steps)
        elif searched and (self.config.get("backend") or {}).get("static_graph") is True:
            why = "learns the graph from the first backward, and batch.micro_size=auto makes it a trial"
            self.add("backend.static_graph", why, "give batch.micro_size, or leave static_graph out", True)
        elif micro is not None and steps is not None:
            if micro * steps * world != size:
                self._contradiction(size, micro, steps, world)
        elif size % world:
            sizes = " or ".join(
                f"batch.global_size={value}" for value in (size - size % world, size + -size % world) if value
            )
            # First what changes no result.
            launch = self.config.get("launch")
            nodes = launch.get("nnodes", 1) if isinstance(launch, dict) else 1
            nodes = nodes if type(nodes) is int and world % nodes == 0 else 1
            fewer = [n for n in range(1, world // nodes) if size % (n * nodes) == 0]
            near = f"launch.nproc_per_node={fewer[-1]}; or, another training, {sizes}" if fewer else sizes
            equation = f"{size} = {micro or '?'} x {steps or '?'} x {world}"
            self.add(
                "batch.global_size", f"{_EQUATION}: {equation} has no whole solution", f"these would work: {near}", size
            )
        elif not searched:
            self._derive(batch, accumulation, world)

    def _derive(self, batch: dict[str, Any], accumulation: dict[str, Any], world: int) -> None:
        size, micro, steps = batch["global_size"], batch.get("micro_size"), accumulation.get("steps")
        each = size // world
        key, given = ("batch.micro_size", micro) if micro is not None else ("accumulation.steps", steps or 1)
        if each % given:
            equation = f"{size} = {micro or '?'} x {steps or '?'} x {world}"
            values = " or ".join(f"{key}={value}" for value in _divisors_near(each, given))
            self.add(key, f"{_EQUATION}: {equation} has no whole solution", f"these would work: {values}", given)
            return
        batch["micro_size"], accumulation["steps"] = micro or each // given, each // (micro or each // given)

    def _contradiction(self, size: int, micro: int, steps: int, world: int) -> None:
        works = []
        if size % (micro * world) == 0:
            works.append(f"accumulation.steps={size // (micro * world)}")
        if size % (steps * world) == 0:
            works.append(f"batch.micro_size={size // (steps * world)}")
        works.append(f"batch.global_size={micro * steps * world}")
        if len(works) < 2 and size % world == 0:
            each = size // world
            works += [f"accumulation.steps={s} with batch.micro_size={each // s}" for s in _divisors_near(each, steps)]
        why = f"{_EQUATION}, but {size} is not {micro} x {steps} x {world} = {micro * steps * world}"
        mark = self.last("batch.global_size", "batch.micro_size", "accumulation.steps")
        self.add("batch", why, f"these would work: {' or '.join(works[:2])}", mark=mark)


def _divisors_near(number: int, wanted: int) -> list[int]:
    """The divisors of a number just below and just above what was wanted."""
    small = [d for d in range(1, math.isqrt(min(number, 10**12)) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    below = [d for d in divisors if d < wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    if not above:
        below = divisors[-2:]
    return [*below, *above]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return True  # it is there, and says more when it is imported


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def matches(value: Any, key: Key) -> bool:
    """Whether a value is of one of the key's types and within its limits."""
    if isinstance(value, bool):
        return bool in key.kinds
    if isinstance(value, str):
        return str in key.kinds or value in key.words
    if isinstance(value, int) and (int in key.kinds or float in key.kinds):
        return abs(value) <= _LARGEST and within(value, key.limits)
    if isinstance(value, float) and float in key.kinds:
        return math.isfinite(value) and within(value, key.limits)
    return False


def within(value: float, limits: Mapping[str, float]) -> bool:
    least, most, above = limits.get("least"), limits.get("most"), limits.get("above")
    return (least is None or value >= least) and (most is None or value <= most) and (above is None or value > above)


def describe(key: Key) -> str:
    """What a key may be, in a sentence: `one of epoch, never, or an integer, at least 1`."""
    parts = []
    if key.words:
        parts.append(f"one of {', '.join(map(str, key.words))}" if len(key.words) > 1 else str(key.words[0]))
    if str in key.kinds:
        parts.append("text")
    if bool in key.kinds:
        parts.append("true or false")
    number = "a whole number" if int in key.kinds else "a number" if float in key.kinds else ""
    if number:
        parts.append(f"{number}{limits_of(key)}")
    if key.section is not None:
        parts.append("a section")
    if list[str] in key.kinds:
        parts.append("a list of texts")
    if dict[str, Any] in key.kinds:
        parts.append("a mapping of options")
    if type(None) in key.kinds and key.section is None:
        parts.append("null")
    return ", or ".join(parts) or "a mapping"


def limits_of(key: Key) -> str:
    words = {"above": "above", "least": "at least", "most": "at most"}
    found = [f"{words[name]} {_limit(limit)}" for name, limit in key.limits.items()]
    if "least" in key.limits and "most" in key.limits:
        return f" from {_limit(key.limits['least'])} to {_limit(key.limits['most'])}"
    return f", {' and '.join(found)}" if found else ""


def _limit(value: float) -> str:
    return "2^63 - 1" if value == _LARGEST else str(value)


def advice(value: Any, key: Key, keys: Keys) -> str:
    """What to write instead of a value that does not match."""
    if isinstance(value, bool) and (key.words or str in key.kinds):
        word = "never" if value is False and ("never" in key.words or keys == ("resume",)) else None
        unquoted = "no, off and false" if value is False else "yes, on and true"
        return f"YAML reads {unquoted} as {plain(value)}: " + (f"write {word}" if word else "put the word in quotes")
    if isinstance(value, str) and value.lower() in ("no", "off", "none") and "never" in key.words:
        return "did you mean never?"
    if isinstance(value, str) and key.words:
        close = difflib.get_close_matches(value.lower(), [str(w) for w in key.words], n=1)
        return f"did you mean {close[0]}?" if close else ""
    if isinstance(value, (int, float)) and str in key.kinds:
        return f'put it in quotes: "{value}"'
    if isinstance(value, float) and int in key.kinds and math.isfinite(value):
        if value.is_integer() and abs(value) < 2**53:
            return f"write it without a point or exponent: {int(value)}"
        if abs(value) >= 2**53:
            return f"at most {_limit(_LARGEST)}, written without a point or exponent"
        return f"for example {round(value)}" if within(round(value), key.limits) else ""
    if isinstance(value, str) and (int in key.kinds or float in key.kinds):
        number = re.fullmatch(r"\s*[-+]?[\d_]+(\.\d*)?([eE][-+]?\d+)?\s*", value)
        return f"write the number without quotes: {value.strip().lstrip('0') or 0}" if number else ""
    if isinstance(value, str) and bool in key.kinds:
        return "write true or false, without quotes"
    if value == 0 and type(None) in key.kinds:
        return "null for none"
    finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if finite and key.limits and "above" not in key.limits and not within(value, key.limits):
        least, most = key.limits.get("least", 0), key.limits.get("most", _LARGEST)
        return f"for example {least if value < least else most}"
    return ""
