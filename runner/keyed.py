"""Seeds that are a function of what they are for."""

from __future__ import annotations

import hashlib


def keyed(*words: int | str) -> int:
    """A signed 64-bit number that depends on all `words`: the seed of whatever they name."""
    text = "/".join(str(word) for word in words).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)
