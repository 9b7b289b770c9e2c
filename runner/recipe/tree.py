"""A configuration while it is put together: plain data, and for every key which file gave it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from runner.errors import Mark
from runner.recipe.document import Keys

#: Keys of which one replaces the other when a later layer gives it.
EXCLUSIVE: tuple[tuple[Keys, tuple[str, ...]], ...] = (
    (("train",), ("epochs", "steps")),
    (("checkpoint", "every"), ("steps", "epochs", "seconds")),
)


class Tree:
    """Nested mappings that layers are merged into, later ones winning."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.marks: dict[Keys, Mark] = {}
        self.layers: dict[Keys, int] = {}
        self.layer = 0

    def merge(self, new: dict[str, Any], mark: Callable[[Keys], Mark], at: Keys = ()) -> None:
        """Merges a layer's mapping below `at`; `mark` says where a key of it (counted from `at`) stands."""
        target: dict[Any, Any] = self.data
        for depth, key in enumerate(at):
            below = target.get(key)
            if not isinstance(below, dict):
                below = target[key] = {}
            self._note(at[: depth + 1], mark(()))
            target = below
        self._merge(target, new, lambda keys: mark(keys[len(at) :]), at)

    def _merge(self, into: dict[Any, Any], new: dict[Any, Any], mark: Callable[[Keys], Mark], at: Keys) -> None:
        for key, value in new.items():
            keys = (*at, key)
            old = into.get(key)
            if isinstance(value, dict) and isinstance(old, dict) and not replaces(old, value):
                self._note(keys, mark(keys))
                self._merge(old, value, mark, keys)
            else:
                if key in into:
                    self.forget(keys)
                into[key] = self._copy(value, mark, keys)

    def _copy(self, value: Any, mark: Callable[[Keys], Mark], keys: Keys) -> Any:
        self._note(keys, mark(keys))
        if isinstance(value, dict):
            return {key: self._copy(item, mark, (*keys, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self._copy(item, mark, (*keys, position)) for position, item in enumerate(value)]
        return value

    def _note(self, keys: Keys, mark: Mark) -> None:
        self.marks[keys] = mark
        self.layers[keys] = self.layer

    def forget(self, keys: Keys) -> None:
        """Drops the marks of a key and of all below it."""
        for known in [k for k in self.marks if k[: len(keys)] == keys]:
            del self.marks[known]
            self.layers.pop(known, None)

    def get(self, keys: Keys) -> Any:
        """The value at a place, or None."""
        value: Any = self.data
        for key in keys:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def has(self, keys: Keys) -> bool:
        parent = self.get(keys[:-1])
        if isinstance(parent, list):
            return isinstance(keys[-1], int) and keys[-1] < len(parent)
        return isinstance(parent, dict) and keys[-1] in parent

    def put(self, keys: Keys, value: Any, mark: Mark) -> Keys | None:
        """Sets one value, merging a mapping; the keys of what stands in the way, where something does."""
        target: Any = self.data
        for depth, key in enumerate(keys[:-1]):
            if isinstance(target, list):
                if not isinstance(key, int) or key >= len(target):
                    return keys[:depth]
            elif key not in target or target[key] is None:
                target[key] = {}
                self._note(keys[: depth + 1], mark)
            target = target[key]
            if not isinstance(target, (dict, list)):
                return keys[: depth + 1]
        if isinstance(target, list):
            if not isinstance(keys[-1], int) or keys[-1] >= len(target):
                return keys[:-1]
            self.forget(keys)
            target[keys[-1]] = self._copy(value, lambda _: mark, keys)
        else:
            self._merge(target, {keys[-1]: value}, lambda _: mark, keys[:-1])
        return None

    def remove(self, keys: Keys) -> None:
        """Removes a key that is there."""
        del self.get(keys[:-1])[keys[-1]]
        self.forget(keys)

    def settle_exclusive(self) -> None:
        """Of keys that exclude each other, those of the latest layer stay; two of one layer both stay."""
        for section, names in EXCLUSIVE:
            if isinstance(self.get(section), dict):
                self._keep_latest([(*section, name) for name in names])

    def _keep_latest(self, candidates: list[Keys]) -> None:
        given = [keys for keys in candidates if self.get(keys) is not None]
        latest = max((self.layers.get(keys, 0) for keys in given), default=0)
        for keys in given:
            if self.layers.get(keys, 0) < latest:
                self.remove(keys)

    def settle_batch(self) -> None:
        """Of micro_size and accumulation.steps that contradict each other, the earlier layer's is derived anew."""
        micro, steps = ("batch", "micro_size"), ("accumulation", "steps")
        size = self.get(("batch", "global_size"))
        values = [size, self.get(micro), self.get(steps)]
        if all(type(v) is int for v in values) and values[1] * values[2] != size:
            self._keep_latest([micro, steps])


def replaces(old: dict[Any, Any], new: dict[Any, Any]) -> bool:
    """Whether a mapping takes the whole place of another: it builds something else, with other arguments."""
    return "_target_" in new and old.get("_target_", new["_target_"]) != new["_target_"]


def leaves(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Every value that is no mapping and no list, with its place."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield keys, value
        return
    for key, item in items:
        yield from leaves(item, (*keys, key))


def mappings(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, dict[Any, Any]]]:
    """Every mapping, at any depth, with its place."""
    if isinstance(value, dict):
        yield keys, value
        for key, item in value.items():
            yield from mappings(item, (*keys, key))
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from mappings(item, (*keys, position))


def dotted(keys: Keys) -> str:
    return ".".join(str(key) for key in keys)
