"""Which micro-batches make one optimizer step: windows of accumulation, and the loaders' passes that feed them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple


class Share(NamedTuple):
    """This process's part of one round of batches, a batch for each process.

    `size` samples are in it, of which the first `real` are its own and not repeated to fill up; `active` processes
    have a batch of their own in this round (None: all). A batch that only keeps others company has `real` 0 and is
    `idle`: it goes through the model and weighs nothing.
    """

    size: int | None = None
    real: int | None = None
    active: int | None = None
    idle: bool = False


class Pass:
    """One pass over a prepared loader, while it is under way."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self.count = 0  # batches given so far
        self.share = Share()
        #: What comes after the present batch, as far as is known; all of it where `whole`.
        self.coming: list[Share] = []
        self.left: int | None = None
        self.finished = False
        self.closed = False
        flow.begin(self)

    def give(self, share: Share) -> None:
        self.count += 1
        self.share = share
        self._flow.advanced(self)

    def remaining(self) -> int:
        """Batches after the present one: exact where it is below the lookahead."""
        return 0 if self.finished else self.left if self.left is not None else len(self.coming)

    def active(self, ahead: int, everybody: int) -> int:
        """Processes with a batch of their own, added up over the present round and the `ahead` next ones."""
        shares = [self.share, *self.coming[:ahead]]
        known = sum(everybody if share.active is None else share.active for share in shares)
        return known + everybody * (ahead + 1 - len(shares))

    def close(self, finished: bool) -> None:
        self.finished = self.finished or finished
        self.closed = True
        self._flow.ended(self)


class Flow:
    """The passes that are under way: the loaders' side of an engine."""

    def __init__(self) -> None:
        self._live: list[weakref.ref[Pass]] = []
        self.lookahead = 1
        #: Told of each new batch: an iteration of the user's loop begins.
        self.on_batch: Any = None

    def begin(self, new: Pass) -> None:
        self._live.append(weakref.ref(new))

    def advanced(self, one: Pass) -> None:
        self._live = [ref for ref in self._live if ref() is not one and ref() is not None]
        self._live.append(weakref.ref(one))
        if self.on_batch is not None:
            self.on_batch()

    def ended(self, one: Pass) -> None:
        self._live = [ref for ref in self._live if ref() is not one and ref() is not None]

    def live(self) -> list[Pass]:
        """The passes that have given a batch and are not over, the latest last."""
        found = [ref() for ref in self._live]
        return [one for one in found if one is not None and one.count]

    def latest(self) -> Pass | None:
        live = self.live()
        return live[-1] if live else None


@dataclass
class Window:
    """The micro-batches of one step as `accumulate` meets them.

    `count` of `size` have begun; `total` counts them over all processes. A window ends early, and is scaled by what it
    then holds, where a loader ends.
    """

    count: int = 0
    size: int = 0
    total: int = 0
    backwards: int = 0

    def __post_init__(self) -> None:
        #: How many batches of each pass the windows so far have used.
        self._used: weakref.WeakKeyDictionary[Pass, int] = weakref.WeakKeyDictionary()
        self._feeding: list[Pass] = []

    def enter(self, flow: Flow, steps: int, processes: int, exact: int | None) -> bool:
        """Begins the next micro-batch. Whether what an earlier loop has left unfinished is to be dropped."""
        feeding = self._advanced(flow)
        abandoned = self.count > 0 and self._abandoned
        if abandoned or self.last:
            self.reset()
        if feeding or abandoned:
            self._feeding = feeding
        if self.count == 0:
            self._open(self._feeding, steps, processes, exact)
        self.count += 1
        for one in self._feeding:
            self._used[one] = min(self._used.get(one, 0) + 1, one.count)
        return abandoned

    def _advanced(self, flow: Flow) -> list[Pass]:
        """The passes that have batches which no micro-batch has used."""
        known = [one for one in self._feeding if one.finished]
        return [one for one in (*known, *flow.live()) if one.count > self._used.get(one, 0)]

    def _open(self, feeding: list[Pass], steps: int, processes: int, exact: int | None) -> None:
        if exact is not None:
            self.size, self.total = exact, exact * processes
            return
        self.size = steps
        for one in feeding:
            # The loop may have fetched several batches before the first of them is used.
            ready = max(1, one.count - self._used.get(one, 0))
            self.size = min(self.size, ready + one.remaining())
        self.total = self.size * processes
        if feeding and feeding[-1].count - self._used.get(feeding[-1], 0) == 1:
            self.total = feeding[-1].active(self.size - 1, processes)

    @property
    def _abandoned(self) -> bool:
        """Whether the loop that fed it was left before its end."""
        return any(one.closed and not one.finished for one in self._feeding)

    @property
    def last(self) -> bool:
        return self.count >= self.size

    @property
    def unfinished(self) -> int:
        """Micro-batches whose gradients wait for a step; 0 where the loop that gave them was left."""
        return 0 if self.last or self._abandoned or not self.backwards else self.count

    def reset(self) -> None:
        self.count = self.size = self.backwards = 0


@contextmanager
def closing(one: Pass) -> Iterator[Pass]:
    """A pass is over when its iterator is exhausted, dropped or left by an exception."""
    try:
        yield one
    except BaseException:
        one.close(finished=False)
        raise
    else:
        one.close(finished=True)
