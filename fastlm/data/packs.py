"""Pairs of sequences to packed batches: without padding, and all of one shape.

A batch holds the sources of its pairs one after another, and their targets, `tokens` of each at most: pairs are taken in the
order of the epoch for as long as both sides have room. What is left at the end belongs to no sequence. As nothing is
padded, pairs need not be of like length to share a batch, and each epoch's order is a plain permutation: every pair comes
exactly once in each. What pair number n of the training is depends on the seed, the data and n alone, so the number of pairs
taken is the whole position, whatever the size of the batches and however often the run was interrupted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from fastlm.data.corpus import DataError
from fastlm.data.order import Draws, EpochOrder
from fastlm.data.position import position_of

__all__ = ["PackLoader", "PackValidation", "Pack", "Pairs"]

Batch = dict[str, torch.Tensor]

SHORTEST = 8
"""A batch of n tokens a side has places for n / SHORTEST pairs: more are there only where most are shorter than that."""


class Pack(NamedTuple):
    """The room of a batch: tokens a side, and pairs."""

    tokens: int
    pairs: int

    @classmethod
    def of(cls, tokens: int) -> Pack:
        """With the places for pairs that so many tokens need."""
        return cls(tokens, max(1, tokens // SHORTEST))


class Pairs(Protocol):
    """What is packed: `count` pairs; `lengths` (count, 2) integers, the tokens of each one's source and target."""

    count: int
    lengths: np.ndarray

    def identity(self) -> dict[str, Any]:
        """What a saved position belongs to, as plain JSON values."""
        ...

    def pack(self, chosen: Sequence[tuple[int, Draws]], room: Pack) -> Batch:
        """A batch of these pairs, which fit into it; all of one `room` have the same shapes."""
        ...


class PackLoader:
    """An endless iterator over training batches.

    Args:
        source: the pairs.
        room: of a batch, as `Pack`, or its tokens a side.
        seed: picks the order, and what is random in a pair.
        rank, world_size: this process, of how many: rank r takes the r-th of every world_size batches.
        prefetch: batches that a thread makes ready in advance. Changes nothing else.

    Raises:
        DataError: a pair that does not fit into a batch.
        ValueError: an argument out of range.
    """

    def __init__(
        self, source: Pairs, room: Pack | int, seed: int = 0, *, rank: int = 0, world_size: int = 1, prefetch: int = 0
    ) -> None:
        self.room = room if isinstance(room, Pack) else Pack.of(room)
        _check(source, self.room)
        for argument, value, low in (("world_size", world_size, 1), ("prefetch", prefetch, 0)):
            if value < low:
                raise ValueError(f"{argument} must be at least {low}, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}")
        self.source, self.seed = source, seed
        self._rank, self._world_size, self._prefetch = rank, world_size, prefetch
        self._cursor = self._tokens = 0
        self._orders: dict[int, EpochOrder] = {}
        self._thread = ThreadPoolExecutor(1, "fastlm-prefetch") if prefetch else None
        self._ready: deque[tuple[int, int, int, Future[Batch]]] = deque()  # (cursor before, after, tokens, batch)

    @property
    def cursor(self) -> int:
        """The global index of the next pair: as many as all ranks together have consumed."""
        return self._cursor

    @property
    def tokens(self) -> int:
        """Tokens in the batches of this rank so far, of both sides."""
        return self._tokens

    @property
    def epoch(self) -> float:
        """Passes over the pairs so far."""
        return self._cursor / self.source.count

    def __iter__(self) -> PackLoader:
        return self

    def __next__(self) -> Batch:
        return self.next_batch()

    def next_batch(self) -> Batch:
        """The next batch, in new CPU tensors."""
        if self._thread is None:
            _, chosen, tokens, after = self._plan(self._cursor)
            batch = self.source.pack(chosen, self.room)
        else:
            while self._ready and self._ready[0][0] != self._cursor:  # the cursor was set
                self._ready.popleft()
            while len(self._ready) <= self._prefetch:
                before, chosen, tokens, after = self._plan(self._ready[-1][1] if self._ready else self._cursor)
                made = self._thread.submit(self.source.pack, chosen, self.room)
                self._ready.append((before, after, tokens, made))
            _, after, tokens, made = self._ready.popleft()
            batch = made.result()
        self._cursor = after
        self._tokens += tokens
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on after the last batch that was handed out; plain JSON values."""
        return {"next_sample": self._cursor, "tokens_so_far": self._tokens, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, whatever the size of the batches and the number of processes were then.

        Raises:
            DataError: `state` is of other data or another seed, or not of such a loader.
        """
        self._cursor, self._tokens = position_of(state, self._identity(), "next_sample", "tokens_so_far")

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, **self.source.identity()}

    def _plan(self, first: int) -> tuple[int, list[tuple[int, Draws]], int, int]:
        """The call that begins at global pair `first`: (first, this rank's pairs, their tokens, where the call ends)."""
        begin, mine = first, (first, np.zeros(0, dtype=np.int64))
        for rank in range(self._world_size):
            numbers = begin + np.arange(self.room.pairs)
            pairs = self._in_order(numbers)
            pairs = pairs[: _fitting(self.source.lengths[pairs], self.room)]
            if rank == self._rank:
                mine = begin, pairs
            begin += len(pairs)
        places = mine[0] + np.arange(len(mine[1]))
        draws = [Draws(self.seed, *divmod(place, self.source.count)) for place in places.tolist()]
        tokens = int(self.source.lengths[mine[1]].sum())
        return first, list(zip(mine[1].tolist(), draws, strict=True)), tokens, begin

    def _in_order(self, numbers: np.ndarray) -> np.ndarray:
        """Which pairs come at these global places."""
        epochs, places = numbers // self.source.count, numbers % self.source.count
        chosen = np.empty_like(numbers)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            if epoch not in self._orders:
                self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}
                self._orders[epoch] = EpochOrder(self.seed, epoch, self.source.count)
            chosen[here] = self._orders[epoch](places[here])
        return chosen


class PackValidation:
    """The same pairs in the same batches each time, what is random in them included; each pair once.

    Args:
        source, room: as for `PackLoader`.
        most: take only so many of the batches, evenly spread; None for all.

    Raises:
        As `PackLoader`.
    """

    def __init__(self, source: Pairs, room: Pack | int, most: int | None = None) -> None:
        self._source, self._room = source, room if isinstance(room, Pack) else Pack.of(room)
        _check(source, self._room)
        if most is not None and most < 1:
            raise ValueError(f"most must be at least 1, got {most}")
        parts, begin = [], 0
        while begin < source.count:
            end = begin + _fitting(source.lengths[begin : begin + self._room.pairs], self._room)
            parts.append(range(begin, end))
            begin = end
        taken = len(parts) if most is None else min(most, len(parts))
        self._parts = [parts[i * len(parts) // taken] for i in range(taken)]

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Batch]:
        for part in self._parts:
            yield self._source.pack([(pair, Draws(0, -1, pair)) for pair in part], self._room)


def _fitting(lengths: np.ndarray, room: Pack) -> int:
    """How many of the first pairs, of lengths (pairs, 2), there is room for."""
    return int((lengths[: room.pairs].cumsum(0) <= room.tokens).all(1).sum())


def _check(source: Pairs, room: Pack) -> None:
    if room.tokens < 1 or room.pairs < 1:
        raise ValueError(f"room must be at least 1 token and 1 pair, got {room}")
    longest = int(source.lengths.max())
    if longest > room.tokens:
        raise DataError(f"a sequence of {longest} tokens does not fit into batches of {room.tokens} tokens a side")
