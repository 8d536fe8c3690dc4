"""Sequence to sequence: a text from a text, as in translation. Loss: mean -ln p over the target's tokens, in nats.

Batches are packed: input_ids holds the sources one after another, each ended by `end_id`, and targets what the decoder has
to say of each, ended likewise; decoder_input_ids are the targets one place later behind `start_id`. Positions count from the
start of each sequence. Where a batch has room left, tokens of no sequence stand: `pad_id`, and targets that are ignored; and
entries of cu_seqlens and target_cu_seqlens that repeat the end. So all batches of one room have the same shapes.

In training the model may smooth its labels; held-out losses are plain.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from fastlm.data import IGNORED, Draws, Pack

from .task import Batch, Evaluator, Limit, MeanLoss, entropy

__all__ = ["SequencePairs", "SequenceToSequence"]

Ids = np.ndarray | Sequence[int]


@dataclass(frozen=True)
class SequenceToSequence:
    """The objective for one vocabulary.

    Args:
        vocab_size: ids are in [0, vocab_size).
        seq_len: the longest sequence of either side, its end included.
        start_id, end_id, pad_id: what the decoder begins with, what ends a text, and what stands where none is.
    """

    vocab_size: int
    seq_len: int
    start_id: int
    end_id: int
    pad_id: int

    name: ClassVar[str] = "sequence-to-sequence"
    outputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size}")
        if self.seq_len < 2:
            raise ValueError(f"seq_len must be at least 2, got {self.seq_len}")
        for key in ("start_id", "end_id", "pad_id"):
            if not 0 <= getattr(self, key) < self.vocab_size:
                raise ValueError(f"{key} must be in [0, {self.vocab_size}), got {getattr(self, key)}")

    def limits(self, room: Pack) -> dict[str, Limit]:
        """Every tensor of a batch."""
        tokens, ends = (room.tokens,), (room.pairs + 1,)
        return {
            "input_ids": Limit(tokens, 0, self.vocab_size),
            "positions": Limit(tokens, 0, self.seq_len),
            "cu_seqlens": Limit(ends, 0, room.tokens + 1),
            "targets": Limit(tokens, 0, self.vocab_size, ignored=True),
            "decoder_input_ids": Limit(tokens, 0, self.vocab_size),
            "target_positions": Limit(tokens, 0, self.seq_len),
            "target_cu_seqlens": Limit(ends, 0, room.tokens + 1),
        }

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors of a batch."""
        return tuple(self.limits(Pack(1, 1)))

    def pack(self, pairs: Iterable[tuple[Ids, Ids]], room: Pack) -> dict[str, torch.Tensor]:
        """A batch of these pairs of ids, ends included.

        Raises:
            ValueError: they do not fit into the room.
        """
        sides = tuple(zip(*pairs, strict=True)) or ((), ())
        ids, positions, ends = zip(*(_joined(side, room) for side in sides), strict=True)
        targets, used = ids[1].copy(), int(ends[1][-1])
        inputs = np.concatenate(([self.start_id], targets[:-1]))
        inputs[ends[1][:-1][ends[1][:-1] < room.tokens]] = self.start_id
        targets[used:], inputs[used:], ids[0][int(ends[0][-1]) :] = IGNORED, self.pad_id, self.pad_id
        arrays = (ids[0], positions[0], ends[0], targets, inputs, positions[1], ends[1])
        return {key: torch.from_numpy(array) for key, array in zip(self.keys, arrays, strict=True)}

    def check(self, batch: Batch) -> None:
        """Hold a batch to what a model may rely on. Waits for the device where the batch is on one.

        Raises:
            ValueError, TypeError: a missing key, a tensor of another dtype or shape, a value out of range.
        """
        for key in self.keys:
            if key not in batch:
                raise ValueError(f"a batch must hold {', '.join(self.keys)}, got {sorted(batch)}")
        room = Pack(batch["input_ids"].numel(), batch["cu_seqlens"].numel() - 1)
        for key, limit in self.limits(room).items():
            limit.check(key, batch[key])
        for key in ("cu_seqlens", "target_cu_seqlens"):
            if int(batch[key][0]) or bool((batch[key].diff() < 0).any()):
                raise ValueError(f"{key} must begin with 0 and never fall, got {batch[key].tolist()}")
            if int(batch[key].diff().max()) > self.seq_len:
                raise ValueError(f"{key} must have sequences of {self.seq_len} at most, got {int(batch[key].diff().max())}")

    def empty(
        self, rows: int, width: int, device: torch.device | str = "cpu", pin_memory: bool = False
    ) -> dict[str, torch.Tensor]:
        """Buffers for a batch of rows * width tokens a side, contents undefined."""
        return {
            key: torch.empty(limit.shape, dtype=torch.int64, device=device, pin_memory=pin_memory)
            for key, limit in self.limits(Pack.of(rows * width)).items()
        }

    def random(self, rows: int, width: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """A batch of rows * width tokens a side that `check` accepts, some of them of no sequence, for audits."""
        room = Pack.of(rows * width)
        pairs: list[tuple[Ids, Ids]] = []
        left = [room.tokens - 1, room.tokens - 1]
        while min(left) >= 1 and len(pairs) < room.pairs:
            lengths = [int(torch.randint(1, min(n, width, self.seq_len) + 1, (), generator=generator)) for n in left]
            source, target = (torch.randint(self.vocab_size, (n,), generator=generator).numpy() for n in lengths)
            pairs.append((source, target))
            left = [n - used for n, used in zip(left, lengths, strict=True)]
        return self.pack(pairs, room)

    def evaluation(self) -> Evaluator:
        """Joins the results of batches."""
        return _Evaluation()

    def baseline(self, batches: Sequence[Batch]) -> tuple[int, float]:
        """How many targets these batches have, and the loss of the best model that sees no input."""
        return entropy(batch["targets"] for batch in batches)


def _joined(side: Sequence[Ids], room: Pack) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids (tokens,), positions (tokens,), cu_seqlens (pairs + 1,)) of sequences, zeros where none is; int64."""
    lengths = np.array([len(ids) for ids in side], dtype=np.int64)
    used = int(lengths.sum())
    if len(side) > room.pairs or used > room.tokens:
        raise ValueError(f"{len(side)} sequences of {used} tokens do not fit into {room}")
    ends = np.full(room.pairs + 1, used, dtype=np.int64)
    ends[0], ends[1 : len(side) + 1] = 0, lengths.cumsum()
    ids, positions = np.zeros((2, room.tokens), dtype=np.int64)
    if side:
        ids[:used] = np.concatenate(side)
    positions[:used] = np.arange(used) - np.repeat(ends[: len(side)], lengths)
    return ids, positions, ends


class _Evaluation(MeanLoss):
    """perplexity: e**loss; token_accuracy: the part of the targets that the model finds likeliest, given those before."""

    def __init__(self) -> None:
        super().__init__()
        self._right = self._all = 0

    def add_batch(
        self, sums: Sequence[float], counts: Sequence[int], batch: Batch, outputs: Mapping[str, torch.Tensor]
    ) -> None:
        super().add_batch(sums, counts, batch, outputs)
        targets, guesses = batch["targets"].cpu(), outputs["guesses"].cpu()
        self._right += int((targets == guesses).sum())
        self._all += int((targets != IGNORED).sum())

    def values(self) -> dict[str, float | None]:
        loss = self._sums[0] / self._counts[0]
        return {
            "perplexity": math.exp(loss) if loss < 709 else math.inf,  # a diverged run, not an error of arithmetic
            "token_accuracy": self._right / max(1, self._all),
        }


@dataclass(eq=False)
class SequencePairs:
    """Pairs of texts as ids, ends included, ready to be packed; `fastlm.data.Pairs`. Those that are too long are left out.

    too_long: how many.
    """

    task: SequenceToSequence
    pairs: InitVar[Iterable[tuple[Ids, Ids]]]
    too_long: int = field(init=False)

    def __post_init__(self, pairs: Iterable[tuple[Ids, Ids]]) -> None:
        pairs = list(pairs)
        kept = [pair for pair in pairs if max(map(len, pair)) <= self.task.seq_len]
        if not kept:
            longest = f"at most seq_len = {self.task.seq_len} tokens a side"
            raise ValueError(f"pairs: got {len(pairs)}, none of {longest}; allowed: one or more")
        self.too_long = len(pairs) - len(kept)
        self._pairs = [(np.asarray(a, dtype=np.int32), np.asarray(b, dtype=np.int32)) for a, b in kept]
        self.count = len(kept)
        self.lengths = np.array([[len(ids) for ids in pair] for pair in kept])
        digest = hashlib.sha256(self.lengths.astype("<i8").tobytes())
        for pair in self._pairs:
            for ids in pair:
                digest.update(ids.astype("<i4").tobytes())
        self._sha256 = digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """About what they take: two arrays each, and what Python holds beside their bytes."""
        return int(4 * self.lengths.sum()) + 300 * self.count

    def identity(self) -> dict[str, Any]:
        return {
            "task": self.task.name,
            "seq_len": self.task.seq_len,
            "examples": self.count,
            "examples_sha256": self._sha256,
        }

    def pack(self, chosen: Sequence[tuple[int, Draws]], room: Pack) -> dict[str, torch.Tensor]:
        return self.task.pack([self._pairs[pair] for pair, _ in chosen], room)
