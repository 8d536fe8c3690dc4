"""Where the tensors of a frame lie in memory, so that those that live at once never overlap and little is needed."""

from __future__ import annotations

import bisect
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

__all__ = ["ALIGN", "Part", "aligned", "place"]

ALIGN = 512  # bytes: a GPU's allocation granularity, and whole cache lines on a CPU


class Part(NamedTuple):
    """The bytes of a lent buffer from `start` to `end`."""

    start: int
    end: int


def aligned(offset: int) -> int:
    """The first place at or after `offset` where a tensor may begin."""
    return -(-offset // ALIGN) * ALIGN


def place(tensors: Sequence[tuple[int, int, int]], taken: Sequence[tuple[Part, int]], lent: int) -> list[int]:
    """An offset for each tensor, given as (born, died, bytes).

    The first `lent` bytes are there at no cost, but for each part of them from the time when it is taken. No tensor lies on
    both sides of their end.

    Large ones first, each at the lowest offset that is free over its life; or, should all end lower then, where the loan is
    taken soonest, which leaves what is taken late to those that live long.
    """
    parts = sorted(taken)
    starts = [aligned(part.start) for part, _ in parts]
    ends = [part.end for part, _ in parts]

    def soonest(offset: int, size: int) -> tuple[bool, int, int]:
        reached = itertools.takewhile(lambda p: p[0].start < offset + size, parts[bisect.bisect_right(ends, offset) :])
        return offset >= lent, min((at for _, at in reached), default=sys.maxsize), offset

    def in_turn(rank: Callable[[int, int], Any]) -> list[int]:
        offsets = [0] * len(tensors)
        placed: list[int] = []
        for i in sorted(range(len(tensors)), key=lambda i: (-tensors[i][2], -tensors[i][1])):
            born, died, size = tensors[i]
            busy = [(part.start, part.end) for part, at in parts if at < died]
            busy += [(offsets[j], offsets[j] + tensors[j][2]) for j in placed if born < tensors[j][1] and tensors[j][0] < died]
            busy += [(lent, lent), (sys.maxsize, sys.maxsize)]
            low, free = 0, []
            for start, end in sorted(busy):
                if low + size <= start:
                    free.append(low)
                    inner = starts[bisect.bisect_right(starts, low) : bisect.bisect_right(starts, start - size)]
                    free += inner
                low = max(low, aligned(end))
            offsets[i] = min(free, key=lambda offset: rank(offset, size))
            placed.append(i)
        return offsets

    def reach(offsets: list[int]) -> int:
        return max((offset + size for offset, (_, _, size) in zip(offsets, tensors, strict=True)), default=0)

    return min((in_turn(rank) for rank in ((lambda offset, _: offset), soonest)[: 1 + bool(lent)]), key=reach)
