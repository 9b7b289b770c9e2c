"""Seeds that are a function of what they are for."""

from __future__ import annotations

import hashlib
import random
import sys

import torch


def keyed(*words: int | str) -> int:
    """A signed 64-bit number that depends on all `words`: the seed of whatever they name."""
    text = "/".join(str(word) for word in words).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def mixed(key: int, number: int) -> int:
    """A 64-bit number that depends on a key and a counter: splitmix64 (Steele, Lea, Flood 2014), a microsecond."""
    x = (key + number * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def seed_all(number: int) -> None:
    """Seeds the process-wide generators: torch's (on the CPU), Python's, and numpy's where that is used."""
    torch.default_generator.manual_seed(number)
    random.seed(number)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(number & 0xFFFFFFFF)


_MASK = (1 << 64) - 1
