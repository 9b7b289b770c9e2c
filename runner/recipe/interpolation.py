"""Resolves ${…} leaf by leaf, each at most once, so that cycles and bombs become problems and not hangs."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import parse

from runner.errors import Problem
from runner.recipe.document import Keys
from runner.recipe.tree import dotted, leaves

#: Bounds of what interpolations may grow to: characters of a text, values that are copied, all together.
MAX_TEXT = 10_000
MAX_COPIES = 3_000
MAX_INTERPOLATIONS = 1_000
#: Characters of all texts with interpolations as they are written: their grammar reads some ten thousand a second.
MAX_WRITTEN = 10_000

#: `${a.b}`: the dots before it, and the path.
REFERENCE = re.compile(r"\$\{\s*(\.*)([\w.\[\]/@-]*)\s*\}")
_PLAIN_RESOLVER = re.compile(r"\$\{\s*(oc\.env|now)\s*:[^${}]*\}")
_MISSING = "???"


def resolve(
    data: dict[str, Any], broken: Collection[str | None] = (), stopped: Collection[str] = ()
) -> tuple[dict[str, Any], list[Problem], set[str]]:
    """A copy with all interpolations resolved, what was wrong, and the keys that are null because of it.

    What refers to something below a key in `broken` is not complained about again. Interpolations of keys in
    `stopped` are not resolved: they have been complained about.
    """
    data = copy.deepcopy(data)
    if not any(isinstance(v, str) and ("${" in v or v == _MISSING) for _, v in leaves(data)):
        return data, [], set()
    resolver = _Resolver(data, broken, stopped)
    return resolver.run(), resolver.problems, {dotted(keys) for keys in resolver.failed}


class _Failed(Exception):
    """An interpolation cannot be resolved: why, and what to do."""

    def __init__(self, why: str, fix: str = "") -> None:
        self.why, self.fix = why, fix
        super().__init__(why)


class _Resolver:
    def __init__(self, data: dict[str, Any], broken: Collection[str | None], stopped: Collection[str]) -> None:
        self.data = data
        self.stopped = stopped
        self.broken = broken
        self.problems: list[Problem] = []
        self.failed: set[Keys] = set()
        self.waiting = {keys: value for keys, value in leaves(data) if isinstance(value, str) and "${" in value}
        self.copies = 0
        self.config = DictConfig({})

    def run(self) -> dict[str, Any]:
        if len(self.waiting) > MAX_INTERPOLATIONS:
            why = f"there are {len(self.waiting):,} interpolations, more than {MAX_INTERPOLATIONS:,}"
            first, text = next(iter(self.waiting.items()))
            self.problems.append(Problem(dotted(first), why, "write values instead", text))
            self.failed.update(self.waiting)
            return self.data
        self._stop_at_length()
        for keys, value in leaves(self.data):
            if value == _MISSING:
                why, fix = "the value is missing (???)", f"give it: {dotted(keys)}=…"
                self.problems.append(Problem(dotted(keys), why, fix, value))
                self.failed.add(keys)
                self._store(keys, None)
        for keys, text in list(self.waiting.items()):
            if dotted(keys) in self.stopped:
                self._fail(keys, text, "", "")
                continue
            try:
                parse(text)
            except RecursionError:
                self._fail(keys, text, "interpolations in interpolations, too many levels deep", "make it flatter")
            except OmegaConfBaseException as error:
                self._fail(keys, text, f"not a valid interpolation: {_first_line(error)}", "close it: ${key}")
        # What waits is masked, so that nothing is resolved on the way to something else, twice and more often.
        self.config = OmegaConf.create(_masked(self.data, frozenset(self.waiting)))
        for keys in list(self.waiting):
            try:
                self._settle(keys, ())
            except RecursionError:
                why = "refers to something that refers to something, too many times"
                self._fail(keys, self.waiting[keys], why, "make the chain shorter")
        return self.data

    def _stop_at_length(self) -> None:
        written = 0
        for keys, text in list(self.waiting.items()):
            if written + len(text) > MAX_WRITTEN:
                why = f"the texts with interpolations have more than {MAX_WRITTEN:,} characters, up to this one"
                self._fail(keys, text, why, "write values instead")
            else:
                written += len(text)

    def _settle(self, keys: Keys, through: tuple[Keys, ...]) -> None:
        """Resolves one leaf, after all leaves that it refers to."""
        if keys not in self.waiting or keys in through:
            return
        text = self.waiting[keys]
        try:
            if self.copies > MAX_COPIES:
                raise _Failed("")  # has been complained about, and copying takes time
            if self._may_refer_to_anything(text):
                for leaf in list(self.waiting):
                    self._settle(leaf, (*through, keys))
            for target in self._targets(keys, text):
                if keys[: len(target)] == target or target in through:
                    circle = [*through[through.index(target) :], keys] if target in through else [keys]
                    raise _Failed(
                        f"refers to itself: {' -> '.join(map(dotted, [*circle, target]))}", "break the circle"
                    )
                for leaf in self._below(target):
                    self._settle(leaf, (*through, keys))
                if str(target[0]) in self.broken or any(failed[: len(target)] == target for failed in self.failed):
                    raise _Failed("")  # what it refers to has been complained about
            self._finish(keys, self._value(keys, text))
        except _Failed as failed:
            self._fail(keys, text, failed.why, failed.fix)

    def _below(self, target: Keys) -> list[Keys]:
        """What waits at a place or below it."""
        if target in self.waiting:
            return [target]
        return [keys for keys in self.waiting if keys[: len(target)] == target]

    def _may_refer_to_anything(self, text: str) -> bool:
        """Whether a text refers by a name that is itself put together, or through a resolver."""
        return "${" in REFERENCE.sub("", _PLAIN_RESOLVER.sub("", text))

    def _targets(self, keys: Keys, text: str) -> list[Keys]:
        """The places that a text refers to by `${a.b}`, `${.b}` or `${a[0]}`."""
        found = []
        for dots, path in REFERENCE.findall(text):
            names = [n for n in re.split(r"[.\[\]]+", path) if n]
            start: Keys = keys[: max(len(keys) - len(dots), 0)] if dots else ()
            if names:
                found.append(self._typed((*start, *names)))
        return found

    def _typed(self, keys: Keys) -> Keys:
        """The same keys with positions in lists, and keys that are numbers, as numbers."""
        value: Any = self.data
        typed: list[str | int] = []
        for key in keys:
            is_number = isinstance(key, str) and key.lstrip("-").isdigit()
            if is_number and (isinstance(value, list) or (isinstance(value, dict) and key not in value)):
                key = int(key)
            typed.append(key)
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                value = None
        return tuple(typed)

    def _value(self, keys: Keys, text: str) -> Any:
        node: Any = self.config
        try:
            for key in keys[:-1]:
                node = node._get_node(key)
            node[keys[-1]] = text
            value = node[keys[-1]]
            if OmegaConf.is_config(value):
                return OmegaConf.to_container(value, resolve=True)
            return value
        except RecursionError:
            raise _Failed("refers to itself", "break the circle") from None
        except OmegaConfBaseException as error:
            raise _Failed(*_reason(error)) from None
        except Exception as error:  # a resolver may raise anything
            raise _Failed(f"cannot be resolved: {_first_line(error)}") from None

    def _finish(self, keys: Keys, value: Any) -> None:
        if value is not None and not isinstance(value, (bool, int, float, str, list, dict)):
            raise _Failed(f"gives a {type(value).__name__}, which cannot stand in a configuration")
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise _Failed(f"grows to {len(value):,} characters", f"at most {MAX_TEXT:,} are allowed")
        if isinstance(value, (dict, list)):
            self.copies += sum(1 for _ in leaves(value))
            if self.copies > MAX_COPIES:
                raise _Failed(f"interpolations copy more than {MAX_COPIES:,} values", "refer to single values")
        self.waiting.pop(keys)
        self._store(keys, value)

    def _fail(self, keys: Keys, text: str, why: str, fix: str) -> None:
        if self.waiting.pop(keys, None) is not None:
            self.problems += [Problem(dotted(keys), why, fix, text)] if why else []
            self.failed.add(keys)
            self._store(keys, None)

    def _store(self, keys: Keys, value: Any) -> None:
        """Puts a result where it will be read, in the plain data and for interpolations that refer to it."""
        parent: Any = self.data
        node: Any = self.config
        for key in keys[:-1]:
            parent = parent[key]
            node = node._get_node(key) if node is not None and len(self.config) else None
        parent[keys[-1]] = value
        if node is not None and len(self.config):
            node[keys[-1]] = value.replace("${", "\\${") if isinstance(value, str) else value


def _masked(value: Any, waiting: frozenset[Keys], keys: Keys = ()) -> Any:
    if isinstance(value, dict):
        return {key: _masked(item, waiting, (*keys, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_masked(item, waiting, (*keys, position)) for position, item in enumerate(value)]
    return _MISSING if keys in waiting else value


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _reason(error: OmegaConfBaseException) -> tuple[str, str]:
    text = _first_line(error)
    variable = re.search(r"Environment variable '(.*?)' not found", text)
    if variable:
        name = variable.group(1)
        return f"the environment variable {name} is not set", f"set it, or write ${{oc.env:{name},DEFAULT}}"
    if "to missing value" in text.lower() or "missing mandatory value" in text.lower():
        return "refers to itself", "break the circle"
    key = re.search(r"Interpolation key '(.*?)' not found", text)
    if key:
        return f"there is no key {key.group(1)}", "refer to a key that exists, by its full name from the top"
    resolver = re.search(r"Unsupported interpolation type (\S+)", text)
    if resolver:
        return f"there is no resolver called {resolver.group(1)}", "oc.env, oc.select, oc.decode, now and others exist"
    return f"cannot be resolved: {text}", ""
