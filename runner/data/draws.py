"""Randomness inside a data set, keyed by what is fetched: it depends on no worker, no resume, and not on the training.

Data sets draw from the process-wide generators of torch (on the CPU), Python and numpy. While data are fetched these
are seeded by (seed, epoch, sample), and afterwards they are as they were.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from runner.keyed import keyed, mixed


class _Generator(Protocol):
    def enter(self) -> None:
        """Before data are fetched: remembers how it was."""

    def leave(self) -> None:
        """Makes it as it was."""

    def moved(self) -> bool:
        """Whether something was drawn since `enter`, where nothing was seeded."""

    def seed(self, number: int) -> None: ...

    def drew(self, number: int) -> bool:
        """Whether something was drawn since `seed(number)`, which counts as undone then."""


class _Torch:
    def enter(self) -> None:
        self._before = torch.default_generator.get_state()

    def leave(self) -> None:
        torch.default_generator.set_state(self._before)

    def moved(self) -> bool:
        return not torch.equal(torch.default_generator.get_state(), self._before)

    def seed(self, number: int) -> None:
        torch.default_generator.manual_seed(number)

    def drew(self, number: int) -> bool:
        now = torch.default_generator.get_state()
        self.seed(number)
        return not torch.equal(now, torch.default_generator.get_state())


class _Python:
    def enter(self) -> None:
        self._before = random.getstate()

    def leave(self) -> None:
        random.setstate(self._before)

    def moved(self) -> bool:
        # The place within the words, the words once they are used up, and the second half of a pair by gauss().
        _, words, gauss = random.getstate()
        _, before, gauss_before = self._before
        return words[-1] != before[-1] or words[0] != before[0] or gauss != gauss_before

    def seed(self, number: int) -> None:
        random.seed(number)

    def drew(self, number: int) -> bool:
        now = random.getstate()
        random.seed(number)
        return now != random.getstate()


class _Numpy:
    """Keeping and comparing numpy's state takes 30 us each, so a bit generator of our own takes its place instead."""

    def __init__(self) -> None:
        self._numpy = sys.modules["numpy.random"]
        self._fresh()

    def _fresh(self) -> None:
        self._own, self._twin = self._numpy.MT19937(0), self._numpy.MT19937(0)

    def enter(self) -> None:
        self._theirs = self._numpy.get_bit_generator()
        self._numpy.set_bit_generator(self._own)

    def leave(self) -> None:
        self._numpy.set_bit_generator(self._theirs)

    def moved(self) -> bool:
        moved = self._own.random_raw() != self._twin.random_raw()
        if moved:
            self._again()
        return bool(moved)

    def seed(self, number: int) -> None:
        self._numpy.seed(number & 0xFFFFFFFF)

    def drew(self, number: int) -> bool:
        now = str(self._own.state)
        self.seed(number)
        drew = now != str(self._own.state)
        self._again()
        return drew

    def _again(self) -> None:
        """Both alike, where the one that is in place has been seeded or drawn from."""
        self._fresh()
        self._numpy.set_bit_generator(self._own)


class Draws:
    """Seeds the generators that a data set draws from, which it learns from the first batch and keeps looking for.

    What draws nothing costs a look at the generators a batch. Where a data set draws for the first time later, that
    batch is fetched once more, so that it comes out as if it had been known.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[str, _Generator] = {"torch": _Torch(), "python": _Python()}
        #: The names of those that the data set draws from; None while that is unknown.
        self._drawn: set[str] | None = None
        self._keys: dict[tuple[str, int], int] = {}

    def __reduce__(self) -> Any:
        # A worker learns by itself.
        return Draws, (self._seed,)

    def key(self, what: str, epoch: int, place: int) -> int:
        """The seed of a sample or batch."""
        if (what, epoch) not in self._keys:
            self._keys = {name: key for name, key in self._keys.items() if name[1] == epoch}
            self._keys[what, epoch] = keyed(self._seed, what, epoch)
        return mixed(self._keys[what, epoch], place)

    def fetched(self, fetch: Callable[[Seeding], Any], epoch: int) -> Any:
        """What `fetch` gives; it is to call what it is given before each sample, and before the collate."""
        generators = self._there()
        entered = list(generators.values())
        for generator in entered:
            generator.enter()
        restore = entered
        try:
            if self._drawn is None:
                learning = _Learning(self, epoch, generators)
                found = fetch(learning)
                self._drawn = learning.drawn()
            else:
                drawn = self._drawn
                restore = [g for name, g in generators.items() if name in drawn or name == "numpy"]
                found = fetch(Seeding(self, epoch, [g for name, g in generators.items() if name in drawn]))
                new = {name for name, g in generators.items() if name not in drawn and g.moved()}
                if new:
                    restore = entered
                    self._drawn = drawn | new
                    found = fetch(Seeding(self, epoch, [g for name, g in generators.items() if name in self._drawn]))
        finally:
            for generator in restore:
                generator.leave()
        if len(self._there()) > len(generators):
            # The data set has just imported numpy's generators, and may have drawn from them.
            self._drawn = {*self._drawn, "numpy"}
            return self.fetched(fetch, epoch)
        return found

    @contextmanager
    def apart(self) -> Iterator[Callable[[str, int, int], None]]:
        """Seeds all generators when called with (what, epoch, place); they are as they were afterwards.

        For what cannot be fetched a second time.
        """
        generators = list(self._there().values())
        for generator in generators:
            generator.enter()

        def seed(what: str, epoch: int, place: int) -> None:
            number = self.key(what, epoch, place)
            for generator in generators:
                generator.seed(number)

        try:
            yield seed
        finally:
            for generator in generators:
                generator.leave()

    def _there(self) -> dict[str, _Generator]:
        """The generators by name: numpy's once something has imported it."""
        if "numpy" not in self._generators and hasattr(sys.modules.get("numpy.random"), "set_bit_generator"):
            self._generators = {**self._generators, "numpy": _Numpy()}
        return self._generators


class Seeding:
    """Seeds before a sample is fetched, and before samples are made a batch."""

    def __init__(self, draws: Draws, epoch: int, generators: Sequence[_Generator]) -> None:
        self._draws, self._epoch, self._generators = draws, epoch, generators
        #: Whether there is anything to be seeded.
        self.acts = bool(generators)

    def sample(self, place: int) -> None:
        self._seed("sample", place)

    def batch(self, place: int) -> None:
        self._seed("batch", place)

    def _seed(self, what: str, place: int) -> None:
        number = self._draws.key(what, self._epoch, place)
        for generator in self._generators:
            generator.seed(number)


class _Learning(Seeding):
    """Seeds all generators, and looks which of them are drawn from."""

    def __init__(self, draws: Draws, epoch: int, generators: dict[str, _Generator]) -> None:
        super().__init__(draws, epoch, list(generators.values()))
        self.acts = True
        self._named = generators
        self._drawn: set[str] = set()
        self._last: int | None = None

    def _seed(self, what: str, place: int) -> None:
        self.drawn()
        self._last = self._draws.key(what, self._epoch, place)
        for generator in self._generators:
            generator.seed(self._last)

    def drawn(self) -> set[str]:
        """Those that were drawn from so far."""
        if self._last is not None:
            self._drawn |= {name for name, generator in self._named.items() if generator.drew(self._last)}
        return self._drawn
