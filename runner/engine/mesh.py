"""This process's place among the data readers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """The parallel axes of a job. One process is a mesh of one data reader."""

    data_rank: int = 0
    data_size: int = 1
