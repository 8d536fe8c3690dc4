"""Philox4x32-10: random bits as a pure function of a key and a counter, the same on every backend.

A mask is never stored: forward and backward compute it from the seed and the place of an element. Four 32-bit
words come from each counter (c0, c1, c2, c3); the words of successive c0 make one stream, word n being word
n & 3 of the counter with c0 = n >> 2. Dropout keeps an element whose word is >= `drop_threshold(p)`.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["drop_threshold", "philox", "philox_lanes"]

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF

Counter = Tensor | int


def drop_threshold(p: float) -> int:
    """The smallest word of a kept element, floor(p * 2**32): a word is smaller with probability p."""
    return int(p * 2.0**32)


def _multiply(constant: int, c: Counter) -> tuple[Counter, Counter]:
    """(high, low) words of a 32 x 32 bit product, by halves of c so that nothing exceeds 2**49."""
    low = constant * (c & 0xFFFF)
    high = constant * (c >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(
    seed: Tensor, c0: Counter, c1: Counter = 0, c2: Counter = 0, c3: Counter = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of each counter.

    Args:
        seed: int64, one element; its low and high 32 bits are the key. Stays on the device.
        c0, c1, c2, c3: int64 tensors that broadcast, or ints, each in [0, 2**32).

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).
    """
    key = seed.reshape(())
    k0: Counter = key & _LOW
    k1: Counter = (key >> 32) & _LOW
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    a, b, c, d = torch.broadcast_tensors(c0, c1, c2, c3)
    return a, b, c, d


def philox_lanes(seed: Tensor, c0: Counter, c1: Counter = 0, c2: Counter = 0, c3: Counter = 0) -> Tensor:
    """The words of counters (..., n) as one stream (..., 4 n): word 4 i + j is word j of counter i."""
    return torch.stack(philox(seed, c0, c1, c2, c3), -1).flatten(-2)
