"""Tokens to batches: shuffled or contiguous windows for training, every token once for validation.

A *sample* is a window of `seq_len` inputs and the `seq_len` targets that follow each of them. Samples are
numbered through all of training by a global index: `index // windows` is its epoch, `index % windows` its
place there. What it holds depends on that number, the tokens, `seq_len` and the seed, and on nothing else:
not on the batch size, the processes, or how often the run was interrupted. So one number is the whole state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from operator import index
from typing import Any

import numpy as np
import torch

from fastlm.data.corpus import DataError
from fastlm.data.order import EpochOrder
from fastlm.data.position import position_of
from fastlm.data.tokens import TokenSplit, fingerprint

__all__ = ["IGNORED", "Loader", "ValidationLoader"]

IGNORED = -100
"""The target that counts for nothing."""

Batch = Mapping[str, torch.Tensor]


class Loader:
    """An endless iterator over training batches.

    A batch is {"input_ids", "targets"}, two int64 tensors (batch_size, seq_len) on the CPU; a target is the
    token that follows its input. In one call, rank r of W takes the samples cursor + r * batch_size onward,
    and the cursor moves by W * batch_size on every rank: together they take what one process with W times the
    batch size would.

    The windows of an epoch do not overlap. They begin at an offset that is drawn for each epoch, so their
    borders move and, over the epochs, every token is learnt; one window's worth of tokens is left out of each
    epoch to make room.

    Contiguous, for models that carry a state: row r of a call goes on where row r of the call before ended, on every rank.
    The W * batch_size rows begin evenly spread over the tokens; where the last window ends, a row goes on with the first.

    Args:
        tokens: a `TokenSplit`, or a one-dimensional integer array, mapped or not.
        batch_size: samples this rank gets at a time.
        seq_len: tokens in a sample.
        seed: picks the order and the offsets.
        rank, world_size: this process, of how many.
        prefetch: batches that a thread makes ready in advance; 0 makes each when it is asked for. Changes
            nothing else.
        contiguous: rows that go on from call to call, instead of shuffled windows. The position can then be restored
            only with as many rows.

    Raises:
        DataError: fewer than seq_len + 1 tokens, contiguous than seq_len for every row and 1.
        ValueError, TypeError: an argument out of range.
    """

    def __init__(
        self,
        tokens: TokenSplit | np.ndarray,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 0,
        contiguous: bool = False,
    ) -> None:
        self._source = _Source(tokens, batch_size, seq_len, rank, world_size)
        self.contiguous = contiguous
        if prefetch < 0:
            raise ValueError(f"prefetch must be at least 0, got {prefetch}")
        targets = len(self._source.tokens) - 1
        # One window less than would fit, when there are two, is what lets the offset vary.
        self.windows = max(1, targets // seq_len - 1)
        self._slack = targets - self.windows * seq_len
        if contiguous:
            rows = self._source.stride
            self._windows_of_a_row = targets // seq_len // rows
            self.windows = self._windows_of_a_row * rows
            if not self.windows:
                raise DataError(
                    f"too few tokens: {targets + 1}, and {rows} contiguous rows of seq_len {seq_len} need "
                    f"{rows * seq_len + 1}; give more text, a shorter seq_len or fewer rows"
                )
        self.seed = index(seed)
        self._cursor = 0
        self._ready: deque[tuple[int, Future[None], Batch]] = deque()  # (first sample, filled, where to)
        self._idle = [self._source.empty() for _ in range(prefetch)]
        self._thread = ThreadPoolExecutor(1, "fastlm-prefetch") if prefetch else None

    @property
    def cursor(self) -> int:
        """The global index of the next sample: as many as all ranks together have consumed."""
        return self._cursor

    @property
    def tokens(self) -> int:
        """Tokens consumed so far by all ranks, by whatever batch sizes."""
        return self._cursor * self._source.seq_len

    @property
    def epoch(self) -> float:
        """Passes over the tokens so far."""
        return self._cursor / self.windows

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        return self.next_batch()

    def next_batch(self, out: Batch | None = None) -> Batch:
        """The next batch: new tensors, or `out` filled and returned.

        Args:
            out: tensors as a batch holds them (pinned memory and any strides will do). A copy of them that is
                still on its way to a device must be waited for by the caller.
        """
        batch = self._source.empty() if out is None else self._source.checked(out)
        if self._thread is None:
            self._fill(self._cursor, batch)
            self._cursor += self._source.stride
            return batch
        self._request(self._thread)
        _, filled, ready = self._ready[0]
        filled.result()
        for name, tensor in ready.items():
            batch[name].copy_(tensor)
        self._cursor += self._source.stride
        self._idle.append(self._ready.popleft()[2])
        self._request(self._thread)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on after the last batch that was handed out; plain JSON values.

        The same on every rank. What a thread has made ready is not counted as consumed.
        """
        return {"next_sample": self._cursor, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, whatever the batch size and the number of processes were then.

        Raises:
            DataError: `state` is of other tokens, another `seq_len` or another seed, or not of a loader.
        """
        (self._cursor,) = position_of(state, self._identity(), "next_sample")

    def _identity(self) -> dict[str, Any]:
        source = self._source
        return {
            "seed": self.seed,
            "seq_len": source.seq_len,
            "tokens": len(source.tokens),
            "tokens_sha256": source.sha256(),
            **({"contiguous_rows": source.stride} if self.contiguous else {}),
        }

    def _request(self, thread: ThreadPoolExecutor) -> None:
        """Have the thread make what comes after the cursor, as far as there is room."""
        if self._ready and self._ready[0][0] != self._cursor:  # the cursor was set
            for _, filled, batch in self._ready:
                filled.exception()  # wait: the thread may be writing to the batch
                self._idle.append(batch)
            self._ready.clear()
        while self._idle:
            first = self._cursor + len(self._ready) * self._source.stride
            batch = self._idle.pop()
            self._ready.append((first, thread.submit(self._fill, first, batch), batch))

    def _fill(self, first: int, batch: Batch) -> None:
        """Fill a batch with this rank's samples of the call that begins at global sample `first`."""
        samples = first + self._source.offset + np.arange(self._source.batch_size)  # (batch,)
        if self.contiguous:
            calls, rows = np.divmod(samples, self._source.stride)
            windows = (rows * self._windows_of_a_row + calls) % self.windows
            self._source.fill(windows * self._source.seq_len, batch)
            return
        epochs, places = samples // self.windows, samples % self.windows
        starts = np.empty_like(samples)
        for epoch in np.unique(epochs):
            order = EpochOrder(self.seed, int(epoch), self.windows)
            here = epochs == epoch
            starts[here] = order(places[here]) * self._source.seq_len + order.shift(self._slack)
        self._source.fill(starts, batch)


class ValidationLoader:
    """The tokens of a split in order: each but the very first is a target exactly once.

    Batches are those of `Loader`, all of one shape. Where the tokens end, targets are -100 (and inputs 0).
    Rank r of W gets the r-th of every W batches, and every rank the same number of batches.

    Args:
        tokens, batch_size, seq_len, rank, world_size: as for `Loader`.
        windows: take only so many windows, evenly spread over the split; None for all.

    Raises:
        As `Loader`.
    """

    def __init__(
        self,
        tokens: TokenSplit | np.ndarray,
        batch_size: int,
        seq_len: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        windows: int | None = None,
    ) -> None:
        self._source = _Source(tokens, batch_size, seq_len, rank, world_size)
        if windows is not None and windows < 1:
            raise ValueError(f"windows must be at least 1, got {windows}")
        fitting = -(-(len(self._source.tokens) - 1) // seq_len)
        self.windows = fitting if windows is None else min(windows, fitting)
        self._starts = np.arange(self.windows) * fitting // self.windows * seq_len

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-self.windows // self._source.stride)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, out: Batch | None = None) -> Iterator[Batch]:
        """One pass: new tensors for each batch, or `out` filled anew and yielded each time."""
        source = self._source
        for number in range(len(self)):
            batch = source.empty() if out is None else source.checked(out)
            first = number * source.stride + source.offset
            source.fill(self._starts[first : first + source.batch_size], batch)
            yield batch


class _Source:
    """What both loaders share: the tokens, one rank's part of a step, and how a window becomes a row."""

    def __init__(
        self, tokens: TokenSplit | np.ndarray, batch_size: int, seq_len: int, rank: int, world_size: int
    ) -> None:
        name, self._sha256 = "tokens", ""
        if isinstance(tokens, TokenSplit):
            name, self._sha256, tokens = f"{tokens.name} tokens", tokens.sha256, tokens.tokens
        for argument, value in (("batch_size", batch_size), ("seq_len", seq_len), ("world_size", world_size)):
            if value < 1:
                raise ValueError(f"{argument} must be at least 1, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}")
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise TypeError(f"tokens must be a 1-d integer array, got {tokens.ndim}-d {tokens.dtype}")
        if len(tokens) <= seq_len:
            raise DataError(
                f"too few {name}: {len(tokens)}, and one window of seq_len {seq_len} needs {seq_len + 1}; "
                "give more text, a shorter seq_len or another validation fraction"
            )
        self.tokens = tokens.view(np.ndarray)  # slices of np.memmap itself are slow
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.stride = batch_size * world_size
        self.offset = batch_size * rank

    def sha256(self) -> str:
        self._sha256 = self._sha256 or fingerprint(self.tokens)
        return self._sha256

    def empty(self) -> Batch:
        shape = self.batch_size, self.seq_len
        return {name: torch.empty(shape, dtype=torch.int64) for name in ("input_ids", "targets")}

    def checked(self, out: Batch) -> Batch:
        shape = self.batch_size, self.seq_len
        for name in ("input_ids", "targets"):
            if name not in out:
                raise ValueError(f"out must hold 'input_ids' and 'targets', got {sorted(out)}")
            given = out[name]
            if tuple(given.shape) != shape or given.dtype != torch.int64 or given.device.type != "cpu":
                raise ValueError(
                    f"out[{name!r}] must be an int64 CPU tensor of shape {shape}, "
                    f"got {given.dtype} on {given.device} of shape {tuple(given.shape)}"
                )
        return out

    def fill(self, starts: np.ndarray, batch: Batch) -> None:
        """Write the windows that begin at `starts` to the first rows; the others get ignored targets."""
        inputs, targets = batch["input_ids"].numpy(), batch["targets"].numpy()
        for row, start in enumerate(starts.tolist()):
            window = self.tokens[start : start + self.seq_len + 1]
            count = len(window) - 1
            inputs[row, :count] = window[:-1]
            targets[row, :count] = window[1:]
            inputs[row, count:] = 0
            targets[row, count:] = IGNORED
        inputs[len(starts) :] = 0
        targets[len(starts) :] = IGNORED
