"""This process among the others: as a launcher says, or as a group that exists already."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from runner import distributed
from runner.distributed import Ranks
from runner.errors import InputError
from runner.launch.environment import Environment

if TYPE_CHECKING:
    from torch.distributed import Store

#: How many groups engines have made in this process: each gets keys of its own in a store that a launcher keeps.
_made = [0]


def ranks_here() -> Ranks:
    """This process's place. Raises InputError for an environment that names it by halves."""
    environment = Environment.read()
    ranks = environment.ranks
    if distributed.joined():
        rank, world = distributed.rank(), distributed.world_size()
        if ranks is not None and (ranks.rank, ranks.world_size) == (rank, world):
            return ranks
        return Ranks(rank, world, rank, world)
    if environment.problems:
        raise InputError(*environment.problems)
    return ranks or Ranks()


def join(ranks: Ranks, device_type: str, seconds: float) -> Store:
    """Makes the process group of the job. Returns a store of its own."""
    import torch.distributed as dist

    _made[0] += 1
    store = dist.PrefixStore(f"engine_{_made[0]}", distributed.store(ranks))
    distributed.join(ranks, store, device_type, seconds)
    return store


def leave(store: Store, seconds: float) -> None:
    """Leaves the group with the others, as far as they come within `seconds`: one may have ended alone by sys.exit.

    They meet in the store, because a barrier would be taken for an answer to whatever another process waits in.
    """
    import torch.distributed as dist

    gc.collect()
    me, world = distributed.rank(), distributed.world_size()
    try:
        store.set(f"leaves_{me}", "")
        _await(store, [f"leaves_{rank}" for rank in range(world)], seconds)
        store.set(f"has_left_{me}", "")
        if me == 0:  # the store may be its own, and the others are still asking
            _await(store, [f"has_left_{rank}" for rank in range(world)], 1.0)
    except dist.DistError:
        pass  # the process with the store is gone
    dist.destroy_process_group()
    distributed.leave(together=False)


def _await(store: Store, keys: Iterable[str], seconds: float) -> None:
    """Waits for keys of a store, no longer than `seconds`."""
    until = time.monotonic() + seconds
    for key in keys:
        while not store.check([key]) and time.monotonic() < until:
            time.sleep(0.01)
