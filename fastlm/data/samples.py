"""Samples that are made one by one, to batches: the loaders of every task but causal language modelling.

What a sample holds depends on (seed, epoch, place) and the data and on nothing else, as in `Loader`; so the number of
samples taken is the whole position, whatever the batch size and however often the run was interrupted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from fastlm.data.order import Draws, EpochOrder, LengthOrder
from fastlm.data.position import position_of

__all__ = ["SampleLoader", "SampleValidation", "Samples", "widest"]

Batch = Mapping[str, torch.Tensor]

WIDTH = 16
"""Batches of samples that say their lengths are as wide as their longest, rounded up to a multiple of this."""


class Samples(Protocol):
    """What a loader draws from: `count` samples of at most `seq_len` tokens.

    `lengths` (count,) integers, the tokens of each sample, groups like lengths; None where every batch is of `seq_len`.
    """

    count: int
    seq_len: int
    lengths: np.ndarray | None

    def identity(self) -> dict[str, Any]:
        """What a saved position belongs to, as plain JSON values."""
        ...

    def empty(self, rows: int, width: int) -> dict[str, torch.Tensor]:
        """A batch of so many rows and columns, contents undefined."""
        ...

    def fill(self, batch: Batch, row: int, sample: int, draws: Draws) -> int:
        """Write a sample to a row of the batch, padding included; returns its tokens."""
        ...

    def blank(self, batch: Batch, row: int) -> None:
        """Write a row that counts for nothing."""
        ...


class SampleLoader:
    """An endless iterator over training batches.

    Args:
        source: the samples.
        batch_size: samples this rank gets at a time.
        seed: picks the order, and what is random in a sample.
        rank, world_size: this process, of how many: rank r takes the samples cursor + r * batch_size onward.
        prefetch: batches that a thread makes ready in advance. Changes nothing else.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        source: Samples,
        batch_size: int,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 0,
    ) -> None:
        for argument, value, low in (("batch_size", batch_size, 1), ("world_size", world_size, 1), ("prefetch", prefetch, 0)):
            if value < low:
                raise ValueError(f"{argument} must be at least {low}, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.samples = source.count if source.lengths is None else LengthOrder.samples(source.count)
        self._stride, self._offset = batch_size * world_size, batch_size * rank
        self._cursor = self._tokens = 0
        self._orders: dict[int, EpochOrder | LengthOrder] = {}
        self._prefetch = prefetch
        self._thread = ThreadPoolExecutor(1, "fastlm-prefetch") if prefetch else None
        self._ready: deque[tuple[int, Future[tuple[dict[str, torch.Tensor], int]]]] = deque()

    @property
    def cursor(self) -> int:
        """The global index of the next sample: as many as all ranks together have consumed."""
        return self._cursor

    @property
    def tokens(self) -> int:
        """Tokens in the batches of this rank so far, padding not counted."""
        return self._tokens

    @property
    def epoch(self) -> float:
        """Passes over the samples so far."""
        return self._cursor / self.samples

    def __iter__(self) -> SampleLoader:
        return self

    def __next__(self) -> Batch:
        return self.next_batch()

    def next_batch(self) -> dict[str, torch.Tensor]:
        """The next batch, in new CPU tensors."""
        if self._thread is None:
            batch, tokens = self._make(self._cursor)
        else:
            while self._ready and self._ready[0][0] != self._cursor:  # the cursor was set
                self._ready.popleft()
            for ahead in range(len(self._ready), self._prefetch + 1):
                first = self._cursor + ahead * self._stride
                self._ready.append((first, self._thread.submit(self._make, first)))
            batch, tokens = self._ready.popleft()[1].result()
        self._cursor += self._stride
        self._tokens += tokens
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on after the last batch that was handed out; plain JSON values."""
        return {"next_sample": self._cursor, "tokens_so_far": self._tokens, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, whatever the batch size and the number of processes were then.

        Raises:
            DataError: `state` is of other data or another seed, or not of such a loader.
        """
        self._cursor, self._tokens = position_of(state, self._identity(), "next_sample", "tokens_so_far")

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, **self.source.identity()}

    def _make(self, first: int) -> tuple[dict[str, torch.Tensor], int]:
        """(the batch of this rank in the call that begins at global sample `first`, its tokens)."""
        numbers = first + self._offset + np.arange(self.batch_size)  # (batch,)
        epochs, places = numbers // self.samples, numbers % self.samples
        chosen = np.empty_like(numbers)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            chosen[here] = self._order(epoch)(places[here])
        draws = [Draws(self.seed, *pair) for pair in zip(epochs.tolist(), places.tolist(), strict=True)]
        return _filled(self.source, self.batch_size, chosen.tolist(), draws)

    def _order(self, epoch: int) -> EpochOrder | LengthOrder:
        if epoch not in self._orders:
            lengths = self.source.lengths
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = (
                EpochOrder(self.seed, epoch, self.samples)
                if lengths is None
                else LengthOrder(self.seed, epoch, lengths)
            )
        return self._orders[epoch]


class SampleValidation:
    """The same samples in the same batches each time, what is random in them included; each sample once.

    The last batch is filled up with rows that count for nothing.

    Args:
        source: the samples; those that say their lengths come shortest first.
        batch_size: rows of a batch.
        most: take only so many samples, evenly spread; None for all.
    """

    def __init__(self, source: Samples, batch_size: int, most: int | None = None) -> None:
        if batch_size < 1 or (most is not None and most < 1):
            raise ValueError(f"batch_size and most must be at least 1, got {batch_size} and {most}")
        taken = source.count if most is None else min(most, source.count)
        chosen = np.arange(taken) * source.count // taken
        if source.lengths is not None:
            chosen = chosen[np.argsort(source.lengths[chosen], kind="stable")]
        self._source, self._batch_size, self._chosen = source, batch_size, chosen.tolist()

    def __len__(self) -> int:
        return -(-len(self._chosen) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._chosen), self._batch_size):
            chosen = self._chosen[start : start + self._batch_size]
            draws = [Draws(0, -1, sample) for sample in chosen]
            yield _filled(self._source, self._batch_size, chosen, draws)[0]


def widest(source: Samples, chosen: Sequence[int] | None = None) -> int:
    """The width of a batch of these samples; None: of all, the widest that there is."""
    if source.lengths is None:
        return source.seq_len
    longest = int((source.lengths if chosen is None else source.lengths[chosen]).max())
    return min(source.seq_len, -(-longest // WIDTH) * WIDTH)


def _filled(
    source: Samples, rows: int, chosen: list[int], draws: list[Draws]
) -> tuple[dict[str, torch.Tensor], int]:
    width = widest(source, chosen)
    batch = source.empty(rows, width)
    tokens = sum(source.fill(batch, row, *pair) for row, pair in enumerate(zip(chosen, draws, strict=True)))
    for row in range(len(chosen), rows):
        source.blank(batch, row)
    return batch, tokens
