"""This process's place among the data readers, and how they share a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """The parallel axes of a job: `data_size` readers, in `replicas` groups each of which shards a model.

    One process is a mesh of one data reader. Ranks are numbered with the shards of a replica beside each other.
    """

    data_rank: int = 0
    data_size: int = 1
    replicas: int = 1

    @property
    def shards(self) -> int:
        """Processes that hold a whole model together, where a backend shards at all."""
        return self.data_size // self.replicas
