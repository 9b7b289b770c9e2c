"""This process among the others: as a launcher says, or as a group that exists already."""

from __future__ import annotations

from runner import distributed
from runner.distributed import Ranks
from runner.errors import InputError
from runner.launch.environment import Environment

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


def join(ranks: Ranks, device_type: str, seconds: float) -> None:
    """Makes the process group of the job."""
    import torch.distributed as dist

    store = distributed.store(ranks)
    _made[0] += 1
    distributed.join(ranks, dist.PrefixStore(f"engine_{_made[0]}", store), device_type, seconds)
