"""G16, exactly once: what loaders give over kills and changes of world, beside an oracle in plain Python."""

from __future__ import annotations

import hashlib
import json
import math
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

#: Every so many cases one has workers.
REAL = 20
KINDS = ("indexed", "indexed", "many", "grouped", "stream", "stateful")


@dataclass(frozen=True)
class Part:
    """What is trained between two starts: so many processes, up to a step; what was read beyond it is lost."""

    readers: int
    micro: int
    until: int
    beyond: int
    workers: int


@dataclass(frozen=True)
class Case:
    kind: str
    length: int
    size: int
    drop_last: bool
    window: int
    seed: int
    parts: tuple[Part, ...]

    def __str__(self) -> str:
        worlds = "-".join(f"{part.readers}x{part.micro}w{part.workers}to{part.until}" for part in self.parts)
        return f"{self.kind}-{self.length}-{self.size}-{'drop' if self.drop_last else 'all'}-{worlds}"


def cases(count: int, seed: int) -> list[Case]:
    draw = random.Random(seed)
    return [_drawn(draw, number) for number in range(count)]


def _drawn(draw: random.Random, number: int) -> Case:
    real = number % REAL == REAL - 1
    unit = draw.choice([1, 2, 4, 6, 12])
    size = unit * draw.randint(1, 4)
    length = draw.choice([draw.randint(1, 12), draw.randint(1, 90), draw.randint(1, 4) * size])
    drop_last = draw.random() < 0.25 and length >= size
    steps = length // size if drop_last else -(-length // size)
    stop = steps * draw.randint(1, 3)
    kills = sorted(draw.sample(range(stop), min(stop, draw.choice([0, 1, 1, 2, 3]))))
    readers_of = [n for n in (1, 2, 3, 4, 6) if size % n == 0]
    parts = []
    for until in [*kills, stop]:
        readers = draw.choice(readers_of[:2] if real else readers_of)
        share = size // readers
        micro = draw.choice([d for d in range(1, share + 1) if share % d == 0])
        workers = draw.choice([1, 2, 3]) if real else 0
        parts.append(Part(readers, micro, until, draw.randint(0, 3), workers))
    kind = KINDS[number // REAL % len(KINDS)] if real else draw.choice(KINDS)
    return Case(kind, length, size, drop_last, draw.randint(1, 5), draw.randrange(1000), tuple(parts))


def run(case: Case, folder: Path | None = None) -> str | None:
    """None where each step had its samples in their order, else the first that differs."""
    expected = oracle(case)
    found: list[list[int]] = []
    state: Any = None
    for part in case.parts:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")
            state = _read(case, part, state, found)
        if (text := json.dumps(state)) and len(text) > 300:
            return f"{case}: the state is no few integers: {text}"
    if found == expected:
        return None
    steps = zip(expected, found, strict=False)
    first = next((n for n, (a, b) in enumerate(steps) if a != b), min(len(expected), len(found)))
    return f"{case}: step {first}: {expected[first : first + 1]}, found {found[first : first + 1]}"


# --- the loaders -----------------------------------------------------------------------------------------------------


class Numbers:
    """Sample i is i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return index


class Many(Numbers):
    def __getitems__(self, indices: list[int]) -> list[int]:
        return [self[index] for index in indices]


class Stream:
    """Iterated; of even lengths it says how long it is."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        yield from range(self.length)


class Stateful(Stream):
    """Goes on by a state of its own."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.place = 0
        self.goes_on = False

    def __iter__(self) -> Iterator[int]:
        self.place = self.place if self.goes_on else 0
        self.goes_on = False
        while self.place < self.length:
            self.place += 1
            yield self.place - 1

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place, self.goes_on = state["place"], True


def _read(case: Case, part: Part, state: Any, found: list[list[int]]) -> Any:
    """Reads on to the end of a part as its processes do together; gives the state with which the next one begins."""
    first = len(found)
    loaders = [_loader(case, part, reader) for reader in range(part.readers)]
    if state:
        for loader in loaders:
            loader.load_state_dict(state)
    read = min(part.until + part.beyond, case.parts[-1].until)
    steps = [loader.steps(first, case.parts[-1].until) for loader in loaders]
    for number in range(first, read):
        together = [next(one) for one in steps]
        if number < part.until:
            found.append(_dealt(together))
    # A kill does not wait for the rest of a step either.
    for one in steps[:1] if part.beyond else []:
        list(islice(one, 0, 1))
    trained = len(found)
    if case.kind not in ("stream", "stateful"):
        return {}
    for loader in loaders:
        loader._trained = lambda: trained
    return json.loads(json.dumps(loaders[0].state_dict()))


def _dealt(together: list[Any]) -> list[int]:
    """The step's samples: micro-batch by micro-batch, of all processes in turn. Padding is left out."""
    if len({len(step.batches) for step in together}) != 1:
        raise AssertionError("processes make different numbers of forward passes")
    most = len(together[0].batches)
    batches = [step.batches[place] for place in range(most) for step in together if place < step.real]
    return [number for batch in batches for number in batch.tolist()]


def _loader(case: Case, part: Part, reader: int) -> Any:
    import torch

    from runner.data.loader import Loader
    from runner.data.order import Order
    from runner.data.stream import StreamLoader, StreamOrder

    how: dict[str, Any] = {"num_workers": part.workers, "reader": reader, "readers": part.readers}
    if case.kind in ("stream", "stateful"):
        order = StreamOrder(case.size, case.length if case.seed % 2 else None, drop_last=case.drop_last)
        dataset = (Stream if case.kind == "stream" else Stateful)(case.length)
        return StreamLoader(dataset, order, part.micro, **how, trained=lambda: 0)
    lengths = torch.tensor(_lengths(case)) if case.kind == "grouped" else None
    order_ = Order(case.length, case.size, case.seed, drop_last=case.drop_last, lengths=lengths, window=case.window)
    return Loader((Many if case.kind == "many" else Numbers)(case.length), order_, part.micro, **how)


# --- the oracle ------------------------------------------------------------------------------------------------------


def _lengths(case: Case) -> list[int]:
    return [i * 7 % 11 for i in range(case.length)]


def oracle(case: Case) -> list[list[int]]:
    """The samples of each step, without a loader, a tensor or a state."""
    steps: list[list[int]] = []
    stop, epoch = case.parts[-1].until, 0
    while len(steps) < stop:
        steps += _epoch(case, epoch)
        epoch += 1
    return steps[:stop]


def _epoch(case: Case, epoch: int) -> list[list[int]]:
    samples = list(range(case.length))
    if case.kind not in ("stream", "stateful"):
        samples = _permuted(case.length, case.seed, "order", epoch)
    steps = [samples[i : i + case.size] for i in range(0, case.length, case.size)]
    if case.drop_last and len(steps[-1]) < case.size:
        steps.pop()
    if case.kind != "grouped":
        return steps
    lengths, found = _lengths(case), []
    for block, start in enumerate(range(0, len(steps), case.window)):
        window = steps[start : start + case.window]
        short = [window.pop()] if len(window[-1]) < case.size else []
        alike = sorted((sample for step in window for sample in step), key=lambda sample: lengths[sample])
        cut = [alike[i : i + case.size] for i in range(0, len(alike), case.size)]
        found += [cut[i] for i in _permuted(len(cut), case.seed, "window", epoch, block)] + short
    return found


def _permuted(length: int, *key: int | str) -> list[int]:
    """A Feistel network of four rounds, walked on until it falls inside."""
    a = max(1, math.isqrt(max(0, length - 1)) + 1)
    b = max(1, -(-length // a))
    keys = [_key(*key, number) for number in range(4)]

    def once(value: int) -> int:
        left, right = divmod(value, b)
        for number in (0, 2):
            left = (left + _mixed(right, keys[number], a)) % a
            right = (right + _mixed(left, keys[number + 1], b)) % b
        return left * b + right

    found = []
    for place in range(length):
        value = once(place)
        while value >= length:
            value = once(value)
        found.append(value)
    return found


def _key(*words: int | str) -> int:
    text = "/".join(map(str, words)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def _mixed(value: int, key: int, bound: int) -> int:
    x = _signed(_signed(value * -4658895280553007687) + key)
    x = _signed((x ^ (x >> 32)) * -7723592293110705685)
    return (((x >> 33) & ((1 << 31) - 1)) * bound) >> 31


def _signed(value: int) -> int:
    """As 64 bits with a sign hold it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
