"""Samples to a batch: as torch's default_collate, and dataclasses and None as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from copy import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch.utils.data import default_collate

Collate = Callable[[list[Any]], Any]


def collate(samples: list[Any]) -> Any:
    """A batch of samples of one structure.

    What torch's default_collate takes becomes what that makes of it. Beyond it, a field that is None in all samples
    is None in the batch, and dataclasses become one of the same class whose fields are batches.
    """
    first = samples[0]
    if first is None:
        raise TypeError("a sample is None")
    return _collate(samples) if _beyond_torch(first) else default_collate(samples)


def _beyond_torch(value: Any) -> bool:
    """Whether torch's own collate would refuse a structure like this."""
    if isinstance(value, (list, tuple)):
        return any(_beyond_torch(item) for item in value)
    if isinstance(value, Mapping):
        return any(_beyond_torch(item) for item in value.values())
    return value is None or (is_dataclass(value) and not isinstance(value, type))


def _collate(values: list[Any]) -> Any:
    first = values[0]
    if not _beyond_torch(first):
        return default_collate(values)
    if first is None:
        there = next((i for i, value in enumerate(values) if value is not None), None)
        if there is not None:
            raise TypeError(f"a field is None in the batch's sample 0 and a {_name(values[there])} in sample {there}")
        return None
    if any(type(value) is not type(first) for value in values):
        kinds = ", ".join(sorted({_name(value) for value in values}))
        raise TypeError(f"a field has several types in one batch: {kinds}")
    if is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in fields(first) if field.init]
        return replace(first, **{name: _collate([getattr(value, name) for value in values]) for name in names})
    if isinstance(first, Mapping):
        batches = {key: _collate([value[key] for value in values]) for key in first}
        return _filled(first, batches)
    if any(len(value) != len(first) for value in values):
        raise TypeError(f"a {_name(first)} has different lengths in one batch")
    parts = [_collate(list(part)) for part in zip(*values, strict=True)]
    if hasattr(first, "_fields"):
        return type(first)(*parts)
    # A tuple becomes a list, as torch has it.
    return parts if isinstance(first, tuple) or type(first) is list else type(first)(parts)


def _filled(like: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """A mapping of the same class, with what else it carries."""
    if type(like) is dict:
        return values
    if isinstance(like, MutableMapping):
        filled = copy(like)
        filled.update(values)
        return filled
    return type(like)(values)  # type: ignore[call-arg]  # as torch: most mappings take one


def _name(value: Any) -> str:
    return type(value).__name__
