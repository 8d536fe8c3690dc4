"""Texts to the ids that a model of sources and targets reads and writes, and back, by any `tokenizer.json`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastlm.data.corpus import DataError
from fastlm.data.library import LibraryTokenizer

__all__ = ["Codec"]


class Codec(LibraryTokenizer):
    """A tokenizer with what it puts around a text, of whatever kind: byte-level, or SentencePiece's as T5 and Marian have it.

    Not every text need come back as it was; the name of a special token, spelt out in a text, is text.
    """

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Codec:
        """Read the `tokenizer.json` of a directory.

        Raises:
            DataError: there is none, or it is none.
        """
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise DataError(f"no tokenizer at {directory}: looked for tokenizer.json")
        try:
            codec = cls.from_json(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises it bare for whatever it dislikes
            raise DataError(f"cannot load a tokenizer from {path}: {error}") from error
        codec._backend.no_truncation()
        codec._backend.no_padding()
        codec._backend.encode_special_tokens = True
        return codec

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str], end_id: int) -> list[list[int]]:
        """The ids of each text, ended by `end_id` whether or not the tokenizer puts it there itself."""
        found = [encoding.ids for encoding in self._backend.encode_batch(texts)]
        return [ids if ids[-1:] == [end_id] else [*ids, end_id] for ids in found]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)
