"""The random generators of one process."""

from __future__ import annotations

import random
import sys

import torch

from runner.api.group import ranks_here
from runner.errors import wrong


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False) -> None:
    """Seeds Python's, NumPy's and torch's generators, on all processes alike; `device_specific` adds the rank.

    `deterministic` lets torch refuse what has no deterministic way to be computed.

    Example:
        set_seed(7)
        model = Model()
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise wrong("seed", "is not a whole number from 0 on", "set_seed(7)", value=seed)
    own = seed + (ranks_here().rank if device_specific else 0)
    random.seed(own)
    torch.manual_seed(own)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(own % 2**32)
    if deterministic:
        torch.use_deterministic_algorithms(True)
