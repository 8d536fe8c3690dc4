"""BERT's pre-training: predict masked tokens from both sides, and whether one segment follows another.

A row is [CLS] A [SEP] B [SEP] of one document, or with probability 1/2 with B from another document; without next
sentence, [CLS] A [SEP]. Of its tokens `mask_rate` are chosen; a chosen token becomes [MASK] with probability 0.8, a
random one with 0.1 and stays with 0.1, and is predicted in any case. With `whole_word` all pieces of a word are chosen
together. Every row has the same number of places for predictions, so that all batches have one shape: `positions` and
`targets` (rows, most), in ascending order, filled up with place 0 and target -100.

The loss is the mean over masked tokens plus, with next sentence, the mean over rows.

Source: Devlin et al., "BERT" (2018), arXiv:1810.04805, section 3.1 and appendix A, and its create_pretraining_data.py,
which also shortens a tenth of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from fastlm.data import IGNORED, DataError, Draws, TokenSplit, WordPiece
from fastlm.data.tokens import fingerprint

from .task import Batch, EncoderTask, Limit, MeanLoss, entropy

__all__ = ["MaskedLM", "MaskedText"]

FOLLOWS, RANDOM = 0, 1
"""Labels of next sentence, as transformers has them."""

_SHORT = 0.1  # of the rows
_LEAST = 8  # tokens of a window
_TRIES = 16


@dataclass(frozen=True)
class MaskedLM(EncoderTask):
    """The objective for one tokenizer.

    Args:
        mask_id: [MASK]'s.
        ordinary: (n,) ids that a random token is drawn from.
        continues: (vocab_size,) bool, whether an id continues a word.
        mask_rate: part of a row's tokens that is predicted, 0 < rate < 1.
        next_sentence: rows are pairs, and the model says whether B follows A.
        whole_word: mask words, not pieces of words.
    """

    mask_id: int
    ordinary: np.ndarray = field(compare=False, repr=False)
    continues: np.ndarray = field(compare=False, repr=False)
    mask_rate: float = 0.15
    next_sentence: bool = True
    whole_word: bool = False

    name: ClassVar[str] = "masked-lm"
    least: ClassVar[int] = 3 + _LEAST

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"mask_rate must be above 0 and below 1, got {self.mask_rate}")
        if self.continues.shape != (self.vocab_size,):
            raise ValueError(f"continues must have shape ({self.vocab_size},), got {self.continues.shape}")
        if not len(self.ordinary):
            raise ValueError("ordinary must not be empty")

    @classmethod
    def of(cls, tokenizer: WordPiece, seq_len: int, **options: Any) -> MaskedLM:
        """The task for a tokenizer; options as the constructor's."""
        return cls(
            tokenizer.vocab_size, seq_len, tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id,
            tokenizer.mask_id, tokenizer.ordinary, tokenizer.continues, **options,
        )  # fmt: skip

    @property
    def most(self) -> int:
        """Places for predictions in a row."""
        return max(1, round(self.mask_rate * self.seq_len))

    def targets(self, rows: int, width: int) -> dict[str, Limit]:
        found = {
            "positions": Limit((rows, self.most), 0, width),
            "targets": Limit((rows, self.most), 0, self.vocab_size, ignored=True),
        }
        return found | ({"next_sentence": Limit((rows,), 0, 2, ignored=True)} if self.next_sentence else {})

    def mask(self, ids: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Choose and mask: ids (n,), with [CLS] and [SEP], -> (positions, targets, ids as the model sees them)."""
        candidates = np.flatnonzero((ids != self.cls_id) & (ids != self.sep_id))
        wanted = min(self.most, max(1, round(self.mask_rate * len(ids))))
        if self.whole_word:
            starts = ~self.continues[ids[candidates]]
            starts |= np.diff(candidates, prepend=-1) > 1  # a piece at the start of a segment
            words = np.split(candidates, np.flatnonzero(starts)[1:])
            chosen: list[int] = []
            for word in draws.permutation(len(words)).tolist():
                if len(chosen) + len(words[word]) <= wanted:
                    chosen += words[word].tolist()
            positions = np.sort(np.array(chosen, dtype=np.int64))
        else:
            positions = np.sort(candidates[draws.permutation(len(candidates))[:wanted]])
        targets, how = ids[positions], draws.uniform(len(positions))
        others = self.ordinary[(draws.uniform(len(positions)) * len(self.ordinary)).astype(np.int64)]
        seen = ids.copy()
        seen[positions] = np.where(how < 0.8, self.mask_id, np.where(how < 0.9, others, targets))
        return positions, targets, seen

    def evaluation(self) -> _Evaluation:
        return _Evaluation(self.next_sentence)

    def baseline(self, batches: Sequence[Batch]) -> tuple[int, float]:
        """(masked tokens, entropy of these tokens plus that of the next-sentence labels)."""
        count, nats = entropy(batch["targets"] for batch in batches)
        if self.next_sentence:
            nats += entropy(batch["next_sentence"] for batch in batches)[1]
        return count, nats


class _Evaluation(MeanLoss):
    """masked_lm_loss, next_sentence_loss and next_sentence_accuracy."""

    def __init__(self, next_sentence: bool) -> None:
        super().__init__()
        self._pairs = next_sentence
        self.names = ("masked_lm_loss", "next_sentence_loss") if next_sentence else ()
        self._right = self._rows = 0

    def add_batch(
        self, sums: Sequence[float], counts: Sequence[int], batch: Batch, outputs: Mapping[str, torch.Tensor]
    ) -> None:
        super().add_batch(sums, counts, batch, outputs)
        if self._pairs:
            labels = batch["next_sentence"].cpu()
            counted = labels != IGNORED
            guesses = outputs["next_sentence"].argmax(-1).cpu()
            self._right += int((guesses == labels)[counted].sum())
            self._rows += int(counted.sum())

    def values(self) -> dict[str, float | None]:
        return {"next_sentence_accuracy": self._right / self._rows if self._rows else None} if self._pairs else {}


class MaskedText:
    """Windows of a tokenized corpus, as pairs and masks that are drawn anew each epoch; `fastlm.data.Samples`.

    Args:
        task: the objective.
        tokens: a `TokenSplit`, or a one-dimensional integer array, in which `sep_id` ends each document.

    Raises:
        DataError: no document is long enough.
    """

    lengths: np.ndarray | None = None

    def __init__(self, task: MaskedLM, tokens: TokenSplit | np.ndarray) -> None:
        self.task, self.seq_len = task, task.seq_len
        self._sha256 = tokens.sha256 if isinstance(tokens, TokenSplit) else ""
        name = f"{tokens.name} tokens" if isinstance(tokens, TokenSplit) else "tokens"
        self._tokens: np.ndarray = tokens.tokens if isinstance(tokens, TokenSplit) else tokens
        room = task.seq_len - (3 if task.next_sentence else 2)
        ends = np.flatnonzero(self._tokens == task.sep_id)
        if not len(ends) or ends[-1] != len(self._tokens) - 1:
            ends = np.append(ends, len(self._tokens))
        begins = np.append(0, ends[:-1] + 1)
        windows = -(-(ends - begins) // room)
        document = np.repeat(np.arange(len(ends)), windows)
        nth = np.arange(len(document)) - np.repeat(np.cumsum(windows) - windows, windows)
        start = begins[document] + nth * room
        length = np.minimum(room, ends[document] - start)
        kept = length >= _LEAST
        self._document, self._start, self._length = document[kept], start[kept], length[kept]
        self._begin, self._end = begins, ends
        self.count = len(self._start)
        if not self.count:
            raise DataError(f"too few {name}: no document has {_LEAST} of them; give more text")
        if task.next_sentence and self.count < 2:
            raise DataError(f"too few {name}: pairs need two windows of {room}; give more text or a shorter seq_len")

    @property
    def nbytes(self) -> int:
        """Of the windows, without the tokens."""
        arrays = self._document, self._start, self._length, self._begin, self._end
        return sum(array.nbytes for array in arrays)

    def identity(self) -> dict[str, Any]:
        self._sha256 = self._sha256 or fingerprint(self._tokens)
        return {
            "task": self.task.name,
            "seq_len": self.seq_len,
            "mask_rate": self.task.mask_rate,
            "next_sentence": self.task.next_sentence,
            "whole_word": self.task.whole_word,
            "tokens": len(self._tokens),
            "tokens_sha256": self._sha256,
        }

    def empty(self, rows: int, width: int) -> dict[str, torch.Tensor]:
        return self.task.empty(rows, width)

    def blank(self, batch: Batch, row: int) -> None:
        self.task.blank(batch, row)

    def fill(self, batch: Batch, row: int, sample: int, draws: Draws) -> int:
        task = self.task
        start, length = int(self._start[sample]), int(self._length[sample])
        if draws.uniform(1)[0] < _SHORT:
            length = 2 + draws.below(length - 1)
        window = self._tokens[start : start + length].astype(np.int64)
        label = FOLLOWS
        if task.next_sentence:
            cut = 1 + draws.below(length - 1)
            first, other = window[:cut], window[cut:]
            if draws.uniform(1)[0] < 0.5 and (found := self._elsewhere(sample, length - cut, draws)) is not None:
                label, other = RANDOM, found
            ids = np.concatenate(([task.cls_id], first, [task.sep_id], other, [task.sep_id]))
            second = len(first) + 2
        else:
            ids = np.concatenate(([task.cls_id], window, [task.sep_id]))
            second = len(ids)
        positions, targets, seen = task.mask(ids, draws)
        task.write(batch, row, seen, second)
        places, labels = batch["positions"][row].numpy(), batch["targets"][row].numpy()
        places[: len(positions)], places[len(positions) :] = positions, 0
        labels[: len(targets)], labels[len(targets) :] = targets, IGNORED
        if task.next_sentence:
            batch["next_sentence"][row] = label
        return len(ids)

    def _elsewhere(self, sample: int, length: int, draws: Draws) -> np.ndarray | None:
        """So many tokens from another document, or with only one from far away in it; None where none were found."""
        own = self._document[sample]
        alone = len(self._begin) == 1
        for _ in range(_TRIES):
            other = draws.below(self.count)
            document = self._document[other]
            last = int(self._end[document]) - length
            start = int(self._start[other]) + draws.below(int(self._length[other]))
            far = abs(start - int(self._start[sample])) >= 2 * self.seq_len if alone else document != own
            if far and last >= self._begin[document]:
                start = min(start, last)
                return self._tokens[start : start + length].astype(np.int64)
        return None
