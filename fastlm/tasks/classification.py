"""Sequence classification: one label for a text, or for a pair of texts. Loss: mean cross-entropy over rows, in nats."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fastlm.data import IGNORED, DataError, WordPiece, read_records

from .task import Batch, EncoderTask, Examples, Limit, MeanLoss

__all__ = ["Classification"]


@dataclass(frozen=True)
class Classification(EncoderTask):
    """The objective for one tokenizer and one set of labels. labels: their names; a target is a place among them."""

    labels: tuple[str, ...]

    name: ClassVar[str] = "classification"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels must be two or more different ones, got {self.labels}")

    @classmethod
    def of(cls, tokenizer: WordPiece, seq_len: int, labels: Sequence[str]) -> Classification:
        """The task for a tokenizer."""
        return cls(
            tokenizer.vocab_size, seq_len, tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tuple(labels)
        )

    def targets(self, rows: int, width: int) -> dict[str, Limit]:
        return {"targets": Limit((rows,), 0, len(self.labels), ignored=True)}

    def write_target(self, batch: Batch, row: int, target: int) -> None:
        batch["targets"][row] = target

    def examples(
        self, tokenizer: WordPiece, texts: Sequence[str], others: Sequence[str] | None, labels: Sequence[str]
    ) -> Examples:
        """Rows of texts, or of pairs of texts, with their labels."""
        firsts = tokenizer.encode_batch(texts)
        seconds: Sequence[list[int] | None] = [None] * len(firsts) if others is None else tokenizer.encode_batch(others)
        place = {label: number for number, label in enumerate(self.labels)}
        rows = zip(firsts, seconds, labels, strict=True)
        return Examples(self, [(*self.join(first, second), place[label]) for first, second, label in rows])

    def evaluation(self) -> _Evaluation:
        return _Evaluation(len(self.labels))


class _Evaluation(MeanLoss):
    """accuracy, and f1: the mean over classes of 2 TP / (2 TP + FP + FN)."""

    chosen_by = "accuracy"

    def __init__(self, classes: int) -> None:
        super().__init__()
        self._confusion = torch.zeros(classes, classes, dtype=torch.int64)  # (label, guess)

    def add_batch(
        self, sums: Sequence[float], counts: Sequence[int], batch: Batch, outputs: Mapping[str, torch.Tensor]
    ) -> None:
        super().add_batch(sums, counts, batch, outputs)
        labels, guesses = batch["targets"].cpu(), outputs["logits"].argmax(-1).cpu()
        counted = labels != IGNORED
        classes = len(self._confusion)
        cells = torch.bincount(labels[counted] * classes + guesses[counted], minlength=classes**2)
        self._confusion += cells.view(classes, classes)

    def values(self) -> dict[str, float | None]:
        right = self._confusion.diagonal().double()
        either = (self._confusion.sum(0) + self._confusion.sum(1)).double()
        f1 = (2 * right / either.clamp(min=1)).mean()
        return {"accuracy": float(right.sum() / self._confusion.sum().clamp(min=1)), "f1": float(f1)}


def read_texts(
    sources: Sequence[str | os.PathLike[str]], text: str, other: str | None, label: str
) -> tuple[list[str], list[str] | None, list[str]]:
    """(texts, second texts or None, labels) of records with these fields.

    Raises:
        DataError: as `read_records`; a text that is no string, a label that is neither string nor integer.
    """
    records = list(read_records(sources, [text, *([other] if other else []), label]))
    texts = [record.text(text) for record in records]
    return texts, [r.text(other) for r in records] if other else None, [r.label(label) for r in records]


def known_labels(labels: Sequence[str], known: Sequence[str], what: str) -> None:
    """Raises DataError for the first label that is not known."""
    for label in labels:
        if label not in known:
            raise DataError(f"{what}: the label {label!r} is not among {', '.join(map(repr, known))}")
