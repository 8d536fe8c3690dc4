"""Token classification: a tag for each word, said at the word's first piece. Loss: mean over words, in nats.

Metrics: accuracy over words; f1 over entities, as CoNLL counts them: an entity is right if its first word, its last
word and its type are. Tags are IOB1 or IOB2 ("B-PER", "I-PER", "O"); tags without a dash are types of their own, and
every word with one that is not "O" belongs to the entity of its neighbours with the same tag.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fastlm.data import IGNORED, Sentence, WordPiece

from .task import Batch, EncoderTask, Examples, Limit, MeanLoss

__all__ = ["Tagging", "entities"]


@dataclass(frozen=True)
class Tagging(EncoderTask):
    """The objective for one tokenizer and one set of tags. labels: the tags; a target is a place among them."""

    labels: tuple[str, ...]

    name: ClassVar[str] = "tagging"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels must be two or more different ones, got {self.labels}")

    @classmethod
    def of(cls, tokenizer: WordPiece, seq_len: int, labels: Sequence[str]) -> Tagging:
        """The task for a tokenizer."""
        return cls(
            tokenizer.vocab_size, seq_len, tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tuple(labels)
        )

    def targets(self, rows: int, width: int) -> dict[str, Limit]:
        return {"targets": Limit((rows, width), 0, len(self.labels), ignored=True)}

    def write_target(self, batch: Batch, row: int, target: Sequence[int]) -> None:
        labels = batch["targets"][row].numpy()
        labels[: len(target)], labels[len(target) :] = target, IGNORED

    def examples(self, tokenizer: WordPiece, sentences: Iterable[Sentence]) -> Examples:
        """A row a sentence; one that is too long for seq_len goes on in further rows, cut between words."""
        place = {label: number for number, label in enumerate(self.labels)}
        rows = []
        for sentence in sentences:
            ids, words = tokenizer.encode_words(sentence.words)
            tags = [IGNORED if word == before else place[sentence.tags[word]]
                    for before, word in zip([None, *words], words, strict=False)]  # fmt: skip
            start, room = 0, self.seq_len - 2
            while start < len(ids):
                end = min(start + room, len(ids))
                while start < end < len(ids) and words[end] == words[end - 1]:
                    end -= 1
                end = end if end > start else start + room  # a word that alone is too long
                joined, second = self.join(ids[start:end])
                rows.append((joined, second, [IGNORED, *tags[start:end], IGNORED]))
                start = end
        return Examples(self, rows)

    def evaluation(self) -> _Evaluation:
        return _Evaluation(self.labels)


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """(first word, last word, type) of each entity."""
    found = set()
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, dash, rest = tag.partition("-")
        inside, now = (prefix, rest) if dash else ("I", tag)
        now = "" if tag == "O" else now
        if kind and (now != kind or inside == "B"):
            found.add((start, place - 1, kind))
            kind = ""
        if now and not kind:
            start, kind = place, now
    return found


class _Evaluation(MeanLoss):
    chosen_by = "f1"

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__()
        self._labels = labels
        self._right = self._words = self._true = self._said = self._both = 0

    def add_batch(
        self, sums: Sequence[float], counts: Sequence[int], batch: Batch, outputs: Mapping[str, torch.Tensor]
    ) -> None:
        super().add_batch(sums, counts, batch, outputs)
        targets, guesses = batch["targets"].cpu(), outputs["logits"].argmax(-1).cpu()
        for target, guess in zip(targets, guesses, strict=True):
            counted = target != IGNORED
            self._right += int((target == guess)[counted].sum())
            self._words += int(counted.sum())
            true, said = (entities([self._labels[i] for i in t[counted].tolist()]) for t in (target, guess))
            self._true += len(true)
            self._said += len(said)
            self._both += len(true & said)

    def values(self) -> dict[str, float | None]:
        f1 = 2 * self._both / (self._true + self._said) if self._true + self._said else None
        return {"accuracy": self._right / max(1, self._words), "f1": f1}
