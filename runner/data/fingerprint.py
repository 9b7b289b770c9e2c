"""What a data set is known again by: its class, its length, and the contents of a few samples."""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from runner.data.main import Remote
from runner.data.stream import is_stream, length_of
from runner.keyed import keyed, mixed

SAMPLES = 16
#: Seconds that reading may take: it ends with the sample at which they are over.
TIME = 0.05

_DEEPEST = 20


def fingerprint(dataset: Any) -> dict[str, Any]:
    """{"class", "length", "items"}: plain values that two processes of different days can compare.

    `items` are hashes of up to 16 samples, always the same ones and in the same order, as many as could be read in
    time; None where contents do not tell: streams, what is read by another process, and samples that are not the same
    when they are read again. No random generator has moved afterwards, and what a data set opens while it is read is
    opened by a copy of it.
    """
    if isinstance(dataset, Remote):
        return {"class": None, "length": dataset.length, "items": None}
    kind = type(dataset)
    length = length_of(dataset)
    indexed = not is_stream(dataset) and bool(length)
    items = _items(dataset, length or 0) if indexed else None
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "length": length, "items": items}


def difference(old: Mapping[str, Any], new: Mapping[str, Any], rank: int | None = None) -> str | None:
    """What two fingerprints differ in, as a clause; None where nothing shows, or one of them does not tell.

    With `rank` they are not of two days, but of rank 0 and of that one.
    """
    kinds, lengths, where = "was a {} and is a {}", "had {} and has {}", ""
    if rank is not None:
        kinds, lengths = f"is a {{}} on rank 0 and a {{}} on rank {rank}", f"has {{}} on rank 0 and {{}} on rank {rank}"
        where = f" on rank {rank} than on rank 0"
    if old.get("class") and new.get("class") and old["class"] != new["class"]:
        return kinds.format(old["class"], new["class"])
    if old.get("length") != new.get("length"):
        return lengths.format(_count(old.get("length")), _count(new.get("length")))
    before, now = old.get("items"), new.get("items")
    if not isinstance(before, list) or not isinstance(now, list):
        return None
    pairs = list(zip(before, now, strict=False))
    changed = sum(1 for one, other in pairs if one != other)
    told = f"{changed} of {len(pairs)} samples that were looked at differ"
    return f"has other contents{where}: {told}" if changed else None


def _count(length: Any) -> str:
    return "no length" if length is None else f"{length} samples"


def positions(length: int) -> list[int]:
    """The samples that are looked at: the first, the last, and others by a fixed rule; none twice."""
    key = keyed("fingerprint", length)
    drawn = (mixed(key, number) % length for number in range(4 * SAMPLES))
    return list(dict.fromkeys([0, length - 1, *drawn]))[:SAMPLES]


def _items(dataset: Any, length: int) -> list[str] | None:
    with _generators_kept(dataset):
        try:
            aside = _aside(dataset)
        except Exception:
            return None  # reading the data set itself might open what its worker processes must open
        found: list[str] = []
        end = time.perf_counter() + TIME
        for number in positions(length):
            try:
                first = _read(aside, number)
                if not found and time.perf_counter() > end:
                    return []
                second = _read(aside, number)
            except Exception:
                break  # whoever trains on it will hear of it
            if first != second:
                return None
            found.append(first)
            if time.perf_counter() > end:
                break
        return found


def _read(dataset: Any, number: int) -> str:
    """The hash of a sample, which is read with fixed seeds: augmentation by the common generators is then fixed too."""
    torch.default_generator.manual_seed(0)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    digest = xxhash.xxh3_64()
    _feed(digest, dataset[number], 0)
    return digest.hexdigest()


# --- reading without a trace ------------------------------------------------------------------------------------------


def _aside(dataset: Any, depth: int = 0) -> Any:
    """A shallow copy of a data set and of those that it wraps."""
    made = copy.copy(dataset)
    for name, value in list(getattr(made, "__dict__", {}).items()):
        if depth < 8 and isinstance(value, torch.utils.data.Dataset):
            made.__dict__[name] = _aside(value, depth + 1)
        elif isinstance(value, list) and value and all(isinstance(one, torch.utils.data.Dataset) for one in value[:64]):
            made.__dict__[name] = [_aside(one, depth + 1) for one in value]
    return made


@contextmanager
def _generators_kept(dataset: Any) -> Iterator[None]:
    """The common random generators, and those that a data set holds, are afterwards where they were."""
    numpy = sys.modules.get("numpy")
    common = (torch.get_rng_state(), random.getstate(), None if numpy is None else numpy.random.get_state())
    own = [(one, _state(one)) for one in _generators(dataset, 0, set())]
    try:
        yield
    finally:
        torch.set_rng_state(common[0])
        random.setstate(common[1])
        if numpy is not None and common[2] is not None:
            numpy.random.set_state(common[2])
        for one, state in own:
            _put_back(one, state)


def _generators(value: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    """Random generators in the attributes of an object, of what these hold, and so on."""
    if id(value) in seen or len(seen) > 500:
        return
    seen.add(id(value))
    if isinstance(value, torch.Generator | random.Random) or _numpy_kind(value):
        yield value
    elif depth < 6 and not isinstance(value, Tensor | str | bytes | type):
        inside = getattr(value, "__dict__", None)
        held = list(inside.values()) if isinstance(inside, dict) else []
        if isinstance(value, list | tuple | dict):
            held += list(value.values() if isinstance(value, dict) else value)[:32]
        for one in held:
            yield from _generators(one, depth + 1, seen)


def _numpy_kind(value: Any) -> str | None:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.random.Generator):
        return "new"
    return "old" if isinstance(value, numpy.random.RandomState) else None


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if _numpy_kind(generator) == "new" else generator.get_state()


def _put_back(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif _numpy_kind(generator) == "new":
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


# --- hashing ----------------------------------------------------------------------------------------------------------


def _feed(digest: Any, value: Any, depth: int) -> None:
    """Adds a value; of what has no contents that can be hashed, only what it is."""
    if isinstance(value, Tensor):
        _feed_tensor(digest, value)
    elif value is None or isinstance(value, bool | int | float | complex | str):
        digest.update(f"{type(value).__name__}:{value!r};".encode("utf-8", "surrogatepass"))
    elif isinstance(value, bytes | bytearray | memoryview):
        digest.update(b"bytes:")
        digest.update(bytes(value))
    elif depth > _DEEPEST:
        digest.update(b"deep;")
    elif isinstance(value, Mapping):
        digest.update(f"mapping:{len(value)};".encode())
        for key in value:
            _feed(digest, key, depth + 1)
            _feed(digest, value[key], depth + 1)
    elif isinstance(value, list | tuple):
        digest.update(f"sequence:{len(value)};".encode())
        for item in value:
            _feed(digest, item, depth + 1)
    elif isinstance(value, set | frozenset):
        inner = sorted(_alone(item, depth + 1) for item in value)
        digest.update(f"set:{','.join(inner)};".encode())
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            _feed(digest, getattr(value, item.name), depth + 1)
    elif hasattr(value, "__array_interface__"):
        _feed_array(digest, value)
    else:
        digest.update(f"{type(value).__module__}.{type(value).__qualname__};".encode())


def _alone(value: Any, depth: int) -> str:
    digest = xxhash.xxh3_64()
    _feed(digest, value, depth)
    return str(digest.hexdigest())


def _feed_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(f"tensor:{tensor.dtype}{list(tensor.shape)};".encode())
    if tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized and tensor.numel():
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)


def _feed_array(digest: Any, value: Any) -> None:
    """An array of numpy's or what shows itself as one, such as an image."""
    numpy = sys.modules["numpy"]
    array = numpy.asarray(value)
    digest.update(f"array:{array.dtype.str}{list(array.shape)};".encode())
    if array.dtype.hasobject:
        for item in array.reshape(-1).tolist():
            _feed(digest, item, 1)
    else:
        digest.update(numpy.ascontiguousarray(array).tobytes())
