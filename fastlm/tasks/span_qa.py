"""Question answering by a span of the context: where the answer begins and where it ends, in tokens.

A row is [CLS] question [SEP] context [SEP]. A context that is too long becomes several rows whose windows overlap by
half; a row that does not hold the whole answer, or whose question has none, is answered by [CLS], place 0. The loss is
the mean over both places of all rows of -log softmax over the row's places, in nats.

Metrics, over the tokens of each row: exact, the part of rows whose span is the right one, and f1, the mean of
2 common / (tokens said + tokens right) over rows, 1 where both say that there is no answer.

Source: Devlin et al., "BERT" (2018), arXiv:1810.04805, section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fastlm.data import IGNORED, Question, WordPiece

from .task import Batch, EncoderTask, Examples, Limit, MeanLoss

__all__ = ["SpanQA", "best_spans"]

_LONGEST = 30  # tokens of an answer that is said


@dataclass(frozen=True)
class SpanQA(EncoderTask):
    """The objective for one tokenizer. targets (rows, 2): first and last place of the answer."""

    name: ClassVar[str] = "span-qa"
    least: ClassVar[int] = 16

    @classmethod
    def of(cls, tokenizer: WordPiece, seq_len: int) -> SpanQA:
        """The task for a tokenizer."""
        return cls(tokenizer.vocab_size, seq_len, tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id)

    def targets(self, rows: int, width: int) -> dict[str, Limit]:
        return {"targets": Limit((rows, 2), 0, width, ignored=True)}

    def check(self, batch: Batch) -> None:
        super().check(batch)
        behind = batch["targets"] >= batch["lengths"][:, None]
        if behind.any():
            row, end = behind.nonzero()[0].tolist()
            got = int(batch["targets"][row, end])
            raise ValueError(f"targets must be among the tokens of their row, got {got} at [{row}, {end}]")

    def random(self, rows: int, width: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        batch = super().random(rows, width, generator)
        inside = batch["targets"] % batch["lengths"][:, None]
        batch["targets"] = torch.where(batch["targets"] == IGNORED, IGNORED, inside)
        return batch

    def write_target(self, batch: Batch, row: int, target: tuple[int, int]) -> None:
        batch["targets"][row] = torch.tensor(target)

    def examples(self, tokenizer: WordPiece, questions: Iterable[Question]) -> Examples:
        """Rows of questions; of several answers the first is learned. A question takes at most half of a row."""
        rows = []
        for question in questions:
            asked = tokenizer.encode(question.question)[: self.seq_len // 2 - 2]
            ids, offsets = tokenizer.encode_offsets(question.context)
            first = last = -1
            if question.answers:
                text, start = question.answers[0]
                end = start + len(text)
                inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
                first, last = (inside[0], inside[-1]) if inside else (-1, -1)
            room = self.seq_len - 3 - len(asked)
            for low in range(0, max(1, len(ids) - room // 2), room // 2):
                window = ids[low : low + room]
                joined, second = self.join(asked, window)
                held = low <= first and last < low + len(window) and first >= 0
                target = (second + first - low, second + last - low) if held else (0, 0)
                rows.append((joined, second, target))
                if low + room >= len(ids):
                    break
        return Examples(self, rows)

    def evaluation(self) -> _Evaluation:
        return _Evaluation()


def best_spans(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The likeliest spans: logits (rows, width, 2) -> (rows, 2), inside segment 1 and at most 30 tokens, or (0, 0)."""
    begin, end = logits.float().cpu().unbind(-1)  # (rows, width)
    width = begin.shape[1]
    place = torch.arange(width)
    inside = (batch["token_type_ids"].cpu() == 1) & (place < batch["lengths"].cpu()[:, None] - 1)
    reach = place[None, :] - place[:, None]  # (first, last)
    allowed = inside[:, :, None] & inside[:, None, :] & (reach >= 0) & (reach < _LONGEST)
    allowed[:, 0, 0] = True
    scores = (begin[:, :, None] + end[:, None, :]).masked_fill(~allowed, -torch.inf)
    best = scores.flatten(1).argmax(1)
    return torch.stack((best // width, best % width), 1)


class _Evaluation(MeanLoss):
    chosen_by = "f1"

    def __init__(self) -> None:
        super().__init__()
        self._rows = self._exact = 0
        self._f1 = 0.0

    def add_batch(
        self, sums: Sequence[float], counts: Sequence[int], batch: Batch, outputs: Mapping[str, torch.Tensor]
    ) -> None:
        super().add_batch(sums, counts, batch, outputs)
        said = best_spans(outputs["logits"], batch)
        for (a, b), (c, d) in zip(said.tolist(), batch["targets"].tolist(), strict=True):
            if c != IGNORED:
                self._rows += 1
                self._exact += (a, b) == (c, d)
                common = max(0, min(b, d) - max(a, c) + 1)
                self._f1 += 2 * common / (b - a + d - c + 2)

    def values(self) -> dict[str, float | None]:
        return {"exact": self._exact / max(1, self._rows), "f1": self._f1 / max(1, self._rows)}
