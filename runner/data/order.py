"""The global order of samples: a function of (seed, epoch, length of the data), computed and never stored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from runner.keyed import keyed

_ROUNDS = 4
_BLOCK = 65_536
_LOW_31 = (1 << 31) - 1


def _hash(values: Tensor, key: int, bound: int) -> Tensor:
    """int64 numbers from 0 to bound - 1 (bound at most 2**32): two multiplications with a fold of the high half."""
    x = values * -4658895280553007687
    x += key
    x ^= x >> 32
    x *= -7723592293110705685
    # Multiply and shift instead of a remainder: a 64-bit division costs ten times as much.
    x >>= 33
    x &= _LOW_31
    x *= bound
    x >>= 31
    return x


class Permutation:
    """A keyed permutation of range(length) that needs no memory.

    Four rounds of a Feistel network on Z_a x Z_b with a * b just above `length` (the generalised form of Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002); results outside are walked on until they fall inside.
    """

    def __init__(self, length: int, *key: int | str) -> None:
        self.length = length
        self._a = max(1, math.isqrt(max(0, length - 1)) + 1)
        self._b = max(1, -(-length // self._a))
        self._keys = [keyed(*key, i) for i in range(_ROUNDS)]

    def __call__(self, positions: Tensor) -> Tensor:
        """Sample indices (int64, same shape) of the positions (int64, each from 0 to length - 1)."""
        values = self._once(positions)
        outside = values >= self.length
        while outside.any():
            values[outside] = self._once(values[outside])
            outside = values >= self.length
        return values

    def _once(self, values: Tensor) -> Tensor:
        left, right = values // self._b, values % self._b
        for i in range(0, _ROUNDS, 2):
            left = left.add_(_hash(right, self._keys[i], self._a))
            left -= (left >= self._a) * self._a
            right = right.add_(_hash(left, self._keys[i + 1], self._b))
            right -= (right >= self._b) * self._b
        return left * self._b + right


class Order:
    """Which samples make which optimizer step, whatever runs it.

    Step s of an epoch owns positions [s * G, (s + 1) * G) of the epoch's permutation, G = `global_size`; the last
    step of an epoch is short unless `drop_last`. With `lengths`, the samples of each window of `window` steps are
    sorted by length and cut into steps, and the steps are put in a random order; a short step stays the last. Without
    `shuffle` all are sorted at once, so that slices of steps do not depend on how large a step is.

    Args:
        length: samples in the data set.
        global_size: samples per optimizer step over the whole job.
        seed: the run's seed.
        drop_last: leave out the short last step.
        lengths: tokens (or any cost) per sample; None for no grouping.
        window: steps in a window of the grouping.
        shuffle: False keeps the data set's own order (evaluation).
    """

    def __init__(
        self,
        length: int,
        global_size: int,
        seed: int = 0,
        *,
        drop_last: bool = False,
        lengths: Sequence[int] | Tensor | None = None,
        window: int = 50,
        shuffle: bool = True,
    ) -> None:
        self.length = length
        self.global_size = global_size
        self.seed = seed
        self.steps_per_epoch = length // global_size if drop_last else -(-length // global_size)
        self.samples_per_epoch = min(length, self.steps_per_epoch * global_size)
        self._lengths = None if lengths is None else torch.as_tensor(lengths)
        self._shuffle = shuffle
        self._steps_per_block = max(1, _BLOCK // global_size)
        if lengths is not None:
            self._steps_per_block = window if shuffle else max(1, self.steps_per_epoch)
        self._cached: tuple[int, int] | None = None
        self._chunks: list[Tensor] = []

    def indices(self, step: int) -> Tensor:
        """Sample indices (int64, at most `global_size`) of the run's optimizer step `step`, counted from 0."""
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        block, in_block = divmod(in_epoch, self._steps_per_block)
        if self._cached != (epoch, block):
            self._chunks = self._block(epoch, block)
            self._cached = (epoch, block)
        return self._chunks[in_block]

    def count(self, step: int) -> int:
        """How many samples step `step` has, without computing which."""
        return min(self.global_size, self.samples_per_epoch - step % self.steps_per_epoch * self.global_size)

    def samples(self, step: int) -> int:
        """How many samples the first `step` steps of the run have seen."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        return epochs * self.samples_per_epoch + min(rest * self.global_size, self.samples_per_epoch)

    def _block(self, epoch: int, block: int) -> list[Tensor]:
        size = self._steps_per_block * self.global_size
        positions = torch.arange(block * size, min((block + 1) * size, self.samples_per_epoch))
        samples = Permutation(self.length, self.seed, "order", epoch)(positions) if self._shuffle else positions
        if self._lengths is None:
            return list(samples.split(self.global_size))
        if not self._shuffle:
            return list(samples[torch.sort(self._lengths[samples], stable=True).indices].split(self.global_size))
        whole = len(samples) - len(samples) % self.global_size
        alike = samples[:whole][torch.sort(self._lengths[samples[:whole]], stable=True).indices]
        steps = list(alike.split(self.global_size)) if whole else []
        mixed = Permutation(len(steps), self.seed, "window", epoch, block)(torch.arange(len(steps)))
        steps = [steps[i] for i in mixed.tolist()]
        return steps + ([samples[whole:]] if whole < len(samples) else [])
