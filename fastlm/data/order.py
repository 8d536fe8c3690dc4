"""The order of samples: a permutation that is computed, not stored.

Sample `i` of epoch `e` is a pure function of (seed, e, i). So nothing about the order has to be saved, or
agreed on between processes, and it takes no memory however long the epoch. The same holds for what is random inside a
sample, masks for instance: `Draws` has it from (seed, e, i) too.

The permutation of [0, count) is a generalised Feistel network (Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002). An index is written as x = left * b + right with left < a, right < b and a * b >=
count. A round maps (left, right) to (right, (left + F(key, right)) mod a) and swaps a and b: whatever F is,
that can be undone. After an even number of rounds the result is again below a * b. With a = ceil(sqrt(count))
there are fewer than a results of count and above; those go through again (cycle walking) until they fall
below it.
"""

from __future__ import annotations

import hashlib
import math
from functools import cached_property

import numpy as np
import numpy.typing as npt

__all__ = ["Draws", "EpochOrder", "LengthOrder"]

ROUNDS = 6
Words = npt.NDArray[np.uint64]


class EpochOrder:
    """The permutation of one epoch. Its values are a promise: they must not change between versions.

    Args:
        seed: any integer.
        epoch: any integer.
        count: number of samples in the epoch, 1 <= count < 2**62.
    """

    def __init__(self, seed: int, epoch: int, count: int) -> None:
        if not 1 <= count < 1 << 62:
            raise ValueError(f"count must be at least 1 and below 2**62, got {count}")
        self.count = count
        root = math.isqrt(count - 1) + 1
        self._radices = root, -(-count // root)
        digest = hashlib.blake2b(f"fastlm sample order {seed} {epoch}".encode(), digest_size=64).digest()
        *self._keys, self._shift = np.frombuffer(digest, dtype="<u8")[: ROUNDS + 1]

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Which sample comes at each place: (n,) integers in [0, count) -> (n,) int64."""
        result = self._permuted(index.astype(np.uint64))
        while (outside := result >= self.count).any():
            result[outside] = self._permuted(result[outside])
        return result.astype(np.int64)

    def shift(self, limit: int) -> int:
        """An integer in [0, limit], the same for the whole epoch."""
        return int(self._shift) % (limit + 1)

    def _permuted(self, index: Words) -> Words:
        a, b = map(np.uint64, self._radices)
        left: Words = index // b
        right: Words = index % b
        for key in self._keys:
            left, right = right, (left + _mixed(right ^ key) % a) % a
            a, b = b, a
        return left * b + right


class LengthOrder:
    """An epoch's order in which neighbours are of like length, so that a batch of them needs little padding.

    The permutation is cut into pools, each pool is sorted by length and cut into groups of `GROUP`, and the groups are
    shuffled over the epoch. A batch of `GROUP` samples, or of a part or multiple of it, is a group, or parts of it. The
    remainder that fills no group, another one each epoch, is left out, unless it is all there is.

    Args:
        seed, epoch: as for `EpochOrder`.
        lengths: (count,) integers.
    """

    GROUP = 32
    POOL = 64 * GROUP

    def __init__(self, seed: int, epoch: int, lengths: np.ndarray) -> None:
        count = len(lengths)
        order = EpochOrder(seed, epoch, count)(np.arange(count))
        pools = np.arange(count) // self.POOL
        order = order[np.lexsort((lengths[order], pools))]
        groups = count // self.GROUP
        if groups:
            shuffled = EpochOrder(seed + 1, epoch, groups)(np.arange(groups))
            order = order[: groups * self.GROUP].reshape(groups, self.GROUP)[shuffled].reshape(-1)
        self._order = order

    @classmethod
    def samples(cls, count: int) -> int:
        """Samples of an epoch over so many."""
        return count if count < cls.GROUP else count - count % cls.GROUP

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Which sample comes at each place: (n,) integers -> (n,) int64."""
        return self._order[index]


class Draws:
    """Random numbers of one sample: a pure function of (seed, epoch, place), by Philox4x64, whose words numpy promises
    to keep from version to version."""

    def __init__(self, seed: int, epoch: int, place: int) -> None:
        self._name = f"fastlm sample draws {seed} {epoch} {place}"

    @cached_property
    def _words(self) -> np.random.Philox:  # most tasks never ask
        digest = hashlib.blake2b(self._name.encode(), digest_size=16).digest()
        return np.random.Philox(key=int.from_bytes(digest, "little"))

    def uniform(self, count: int) -> np.ndarray:
        """(count,) float64 in [0, 1)."""
        return (self._words.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def below(self, limit: int) -> int:
        """An integer in [0, limit)."""
        return int(self.uniform(1)[0] * limit)

    def permutation(self, count: int) -> np.ndarray:
        """(count,) int64: 0 to count - 1 in random order."""
        return np.argsort(self._words.random_raw(count), kind="stable")


def _mixed(x: Words) -> Words:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014): each bit of x reaches each bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
