"""T5's pre-training: the encoder reads a text with spans cut out, the decoder says what stood there.

    text     Thank you for inviting me to your party last week
    inputs   Thank you <extra_id_0> me to your party <extra_id_1> week </s>
    targets  <extra_id_0> for inviting <extra_id_1> last <extra_id_2> </s>

Of n tokens round(noise_density * n) are cut, in round(cut / mean_span) spans. Text and cut are each divided into that many
stretches, every division being as likely as any other, and laid in turn, text first; so a row begins with text and ends
with a span. Each span, and the end of the last one, has its own sentinel, in their order. A row of text is as long as makes
the inputs exactly `seq_len` tokens, and then all targets are of one length, so no batch has padding: 512 inputs come of 568
tokens and have 115 targets. (The authors' code leaves the final sentinel out, which their paper's figure has: 114.)

**Sentinels** are special tokens by T5's names. `with_sentinels` adds them, and `<pad>`, behind the ids of a tokenizer of
ours, in T5's order: the number 0 has the last id. A tokenizer that has them, T5's or one that we saved, is used as it is. The
decoder begins with <pad>, as T5's does.

Source: Raffel et al., "Exploring the limits of transfer learning" (2020), arXiv:1910.10683, section 3.1.4, and the functions
random_spans_helper and random_spans_noise_mask of its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch

from fastlm.data import IGNORED, DataError, Draws, Tokenizer, TokenSplit
from fastlm.data.library import LibraryTokenizer
from fastlm.data.tokens import fingerprint

from .task import Batch, Limit, MeanLoss, RowTask, entropy

__all__ = ["SpanCorruption", "SpanText", "with_sentinels"]

PAD = "<pad>"
SENTINELS = 100
"""As many as T5 has."""


def with_sentinels(tokenizer: Tokenizer, count: int = SENTINELS) -> Tokenizer:
    """The tokenizer with <pad> and `count` sentinels behind its ids; itself if it has sentinels."""
    if tokenizer.sentinels:
        return tokenizer
    pad = [] if tokenizer.special_id(PAD) is not None else [PAD]
    return tokenizer.with_tokens([*pad, *(f"<extra_id_{i}>" for i in reversed(range(count)))])


@dataclass(frozen=True)
class SpanCorruption(RowTask):
    """The objective for one tokenizer.

    A batch has input_ids (rows, width), lengths (rows,) and targets (rows, target_len), all int64; or, packed, what
    `collate` says.

    Args:
        vocab_size: ids are in [0, vocab_size).
        seq_len: tokens of an encoder's input.
        pad_id: <pad>, with which the decoder begins too.
        eos_id: ends inputs and targets.
        sentinels: ids, the first span's first.
        noise_density: part of the text that is cut out, 0 < density < 1.
        mean_span: tokens of a span on average, at least 1.
    """

    vocab_size: int
    seq_len: int
    pad_id: int
    eos_id: int
    sentinels: tuple[int, ...]
    noise_density: float = 0.15
    mean_span: float = 3.0

    name: ClassVar[str] = "span-corruption"
    outputs: ClassVar[bool] = False
    least: ClassVar[int] = 8  # of seq_len

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size}")
        if self.seq_len < self.least:
            raise ValueError(f"seq_len must be at least {self.least}, got {self.seq_len}")
        if not 0 < self.noise_density < 1:
            raise ValueError(f"noise_density must be above 0 and below 1, got {self.noise_density}")
        if not self.mean_span >= 1:
            raise ValueError(f"mean_span must be at least 1, got {self.mean_span}")
        special = (self.pad_id, self.eos_id, *self.sentinels)
        if not all(0 <= token < self.vocab_size for token in special):
            raise ValueError(f"pad_id, eos_id and sentinels must be in [0, {self.vocab_size}), got {special}")
        if len({self.eos_id, *self.sentinels}) != 1 + len(self.sentinels):
            raise ValueError("sentinels must be different ids, and none of them eos_id")
        needed = self.cut(self.text_len)[1] + 1
        if len(self.sentinels) < needed:
            raise ValueError(f"sentinels must be at least {needed} for a seq_len of {self.seq_len}, got {len(self.sentinels)}")

    @classmethod
    def of(cls, tokenizer: LibraryTokenizer, seq_len: int, **options: Any) -> SpanCorruption:
        """The task for a tokenizer that has sentinels; options as the constructor's.

        Raises:
            DataError: it has no <pad>.
        """
        pad = tokenizer.special_id(PAD)
        if pad is None:
            raise DataError(f"the tokenizer has no {PAD}, which span corruption needs")
        return cls(tokenizer.vocab_size, seq_len, pad, tokenizer.separator_id, tokenizer.sentinels, **options)

    def cut(self, length: int) -> tuple[int, int]:
        """(tokens, spans) that are cut out of a text of so many tokens, at least 2."""
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        return noise, min(max(round(noise / self.mean_span), 1), noise, length - noise)

    def lengths_of(self, length: int) -> tuple[int, int]:
        """Tokens of (inputs, targets) of a text of so many."""
        noise, spans = self.cut(length)
        return length - noise + spans + 1, noise + spans + 2

    @cached_property
    def text_len(self) -> int:
        """Tokens of text in a row: the most whose inputs are not longer than seq_len."""
        length = 2
        while self.lengths_of(length + 1)[0] <= self.seq_len:
            length += 1
        return length

    @property
    def target_len(self) -> int:
        """Targets of a row."""
        return self.lengths_of(self.text_len)[1]

    def limits(self, rows: int, width: int) -> dict[str, Limit]:
        return {
            "input_ids": Limit((rows, width), 0, self.vocab_size),
            "lengths": Limit((rows,), 1, width + 1),
            "targets": Limit((rows, self.target_len), 0, self.vocab_size, ignored=True),
        }

    def corrupt(self, ids: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of a text ids (n,), n at least 2, each with its </s>; as long as `lengths_of` says.

        Raises:
            ValueError: the text is too short, or so long that sentinels run out.
        """
        if len(ids) < 2:
            raise ValueError(f"ids must be at least 2 tokens, got {len(ids)}")
        noise, spans = self.cut(len(ids))
        if spans >= len(self.sentinels):
            raise ValueError(f"ids must give fewer than {len(self.sentinels)} spans, got {len(ids)} tokens with {spans}")
        stretches = np.empty(2 * spans, dtype=np.int64)
        stretches[1::2] = _divided(noise, spans, draws)
        stretches[::2] = _divided(len(ids) - noise, spans, draws)
        parts = np.split(ids.astype(np.int64), np.cumsum(stretches)[:-1])
        sentinels = np.array(self.sentinels[: spans + 1])[:, None]
        end = np.array([self.eos_id])
        inputs = [part for pair in zip(parts[::2], sentinels[:-1], strict=True) for part in pair]
        targets = [part for pair in zip(sentinels[:-1], parts[1::2], strict=True) for part in pair]
        return np.concatenate((*inputs, end)), np.concatenate((*targets, sentinels[-1], end))

    def write(self, batch: Batch, row: int, inputs: np.ndarray, targets: np.ndarray) -> None:
        """Write a row of a padded batch."""
        ids, labels = batch["input_ids"][row].numpy(), batch["targets"][row].numpy()
        ids[: len(inputs)], ids[len(inputs) :] = inputs, self.pad_id
        labels[: len(targets)], labels[len(targets) :] = targets, IGNORED
        batch["lengths"][row] = len(inputs)

    def collate(self, rows: Sequence[tuple[np.ndarray, np.ndarray]], packed: bool = False) -> dict[str, torch.Tensor]:
        """A batch of (inputs, targets) of any lengths, as wide as the longest.

        Packed, without padding: input_ids and positions (tokens,) with cu_seqlens (rows + 1,); targets,
        decoder_input_ids and target_positions (target tokens,) with target_cu_seqlens (rows + 1,).
        """
        if not packed:
            widths = [max(len(part) for part in side) for side in zip(*rows, strict=True)]
            batch = {
                "input_ids": torch.empty(len(rows), widths[0], dtype=torch.int64),
                "lengths": torch.empty(len(rows), dtype=torch.int64),
                "targets": torch.empty(len(rows), widths[1], dtype=torch.int64),
            }
            for row, pair in enumerate(rows):
                self.write(batch, row, *pair)
            return batch
        found = {}
        for prefix, side in zip(("", "target_"), zip(*rows, strict=True), strict=True):
            counts = [len(part) for part in side]
            found[f"{prefix}cu_seqlens"] = np.cumsum([0, *counts])
            found[f"{prefix}positions"] = np.concatenate([np.arange(n) for n in counts])
        found["input_ids"] = np.concatenate([inputs for inputs, _ in rows])
        found["targets"] = np.concatenate([targets for _, targets in rows])
        found["decoder_input_ids"] = np.concatenate([(self.pad_id, *targets[:-1]) for _, targets in rows])
        return {name: torch.from_numpy(values.astype(np.int64)) for name, values in found.items()}

    def evaluation(self) -> MeanLoss:
        """Joins the results of batches."""
        return MeanLoss()

    def baseline(self, batches: Sequence[Batch]) -> tuple[int, float]:
        """(targets, nats a target of the best model that sees no text but is told where sentinels and ends are).

        A quarter of the targets are sentinels, of which any model soon knows which one comes next. So they cost nothing
        here, which no model reaches, and what is under this bar has learned of the text.
        """
        targets = torch.cat([batch["targets"].reshape(-1) for batch in batches])
        total = int((targets != IGNORED).sum())
        foreseen = torch.isin(targets, torch.tensor([self.eos_id, *self.sentinels]))
        count, nats = entropy([targets[~foreseen]])
        return total, nats * count / max(1, total)


def _divided(items: int, parts: int, draws: Draws) -> np.ndarray:
    """(parts,) lengths, at least 1 each, of which items is the sum; each such division is as likely as any other."""
    cuts = np.sort(draws.permutation(items - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate(([0], cuts, [items])))


class SpanText:
    """A tokenized corpus in windows that follow each other, cut anew each epoch; `fastlm.data.Samples`.

    Documents follow each other too, each ended by its separator, as in T5; the last window begins where it ends with the
    tokens.

    Args:
        task: the objective.
        tokens: a `TokenSplit`, or a one-dimensional integer array.

    Raises:
        DataError: fewer tokens than one window.
    """

    lengths: np.ndarray | None = None

    def __init__(self, task: SpanCorruption, tokens: TokenSplit | np.ndarray) -> None:
        self.task, self.seq_len = task, task.seq_len
        self._sha256 = tokens.sha256 if isinstance(tokens, TokenSplit) else ""
        name = f"{tokens.name} tokens" if isinstance(tokens, TokenSplit) else "tokens"
        self._tokens: np.ndarray = tokens.tokens if isinstance(tokens, TokenSplit) else tokens
        self._window = task.text_len
        if len(self._tokens) < self._window:
            raise DataError(
                f"too few {name}: {len(self._tokens)}, and a window for seq_len {task.seq_len} needs {self._window}; "
                "give more text or a shorter seq_len"
            )
        self.count = -(-len(self._tokens) // self._window)

    def identity(self) -> dict[str, Any]:
        self._sha256 = self._sha256 or fingerprint(self._tokens)
        return {
            "task": self.task.name,
            "seq_len": self.seq_len,
            "noise_density": self.task.noise_density,
            "mean_span": self.task.mean_span,
            "sentinels": list(self.task.sentinels),
            "tokens": len(self._tokens),
            "tokens_sha256": self._sha256,
        }

    def empty(self, rows: int, width: int) -> dict[str, torch.Tensor]:
        return self.task.empty(rows, width)

    def blank(self, batch: Batch, row: int) -> None:
        self.task.blank(batch, row)

    def fill(self, batch: Batch, row: int, sample: int, draws: Draws) -> int:
        start = min(sample * self._window, len(self._tokens) - self._window)
        inputs, targets = self.task.corrupt(self._tokens[start : start + self._window], draws)
        self.task.write(batch, row, inputs, targets)
        return len(inputs) + len(targets)
