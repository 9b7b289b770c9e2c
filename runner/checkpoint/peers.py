"""The few words that the processes of one save say to each other, in a group that only the save uses."""

from __future__ import annotations

import sys
from typing import Any

from runner import distributed


class Peers:
    """Words over a process group: all processes say each of them in the same order.

    Without `own` it is the job's group, for a save that the training waits for. One that goes on beside the training
    needs a gloo group of its own, so that its words do not get between those of the training; it is made by all
    processes together. What is said is pickled between the job's own processes.
    """

    def __init__(self, *, own: bool = False) -> None:
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self._group: Any = None
        if own and self.world > 1:
            self._group = distributed.another_group()

    @property
    def _torch(self) -> Any:
        return sys.modules["torch.distributed"]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value in rank order on the first process; elsewhere an empty list."""
        if self.world == 1:
            return [value]
        found: list[Any] | None = [None] * self.world if self.rank == 0 else None
        self._torch.gather_object(value, found, 0, group=self._group)
        return found or []

    def scatter(self, values: list[Any] | None) -> Any:
        """This process's one of the first process's values."""
        if self.world == 1:
            assert values is not None
            return values[0]
        box: list[Any] = [None]
        self._torch.scatter_object_list(box, values, 0, group=self._group)
        return box[0]

    def broadcast(self, value: Any) -> Any:
        """The first process's value."""
        if self.world == 1:
            return value
        box = [value]
        self._torch.broadcast_object_list(box, 0, group=self._group)
        return box[0]
