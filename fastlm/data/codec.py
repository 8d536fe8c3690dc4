"""Texts to the ids that a model of sources and targets reads and writes, and back, by any `tokenizer.json`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from fastlm.data.corpus import DataError
from fastlm.data.library import LibraryTokenizer

__all__ = ["Codec"]

_SETTINGS = "tokenizer_config.json"


class Codec(LibraryTokenizer):
    """A tokenizer with what it puts around a text, of whatever kind: byte-level, or SentencePiece's as T5 and Marian have it.

    Not every text need come back as it was; the name of a special token, spelt out in a text, is text.
    """

    settings: str | None = None
    """The `tokenizer_config.json` that was beside it."""

    @classmethod
    def load(cls, directory: str | os.PathLike[str], end_id: int | None = None) -> Codec:
        """Read the `tokenizer.json` of a directory. end_id: what ends a text, as its model says, the `separator_id`.

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
        if end_id is not None:
            codec.separator_id = end_id
        beside = path.with_name(_SETTINGS)
        codec.settings = beside.read_text(encoding="utf-8") if beside.is_file() else None
        return codec

    def files(self) -> dict[str, str]:
        return super().files() | ({} if self.settings is None else {_SETTINGS: self.settings})

    @cached_property
    def sha256(self) -> str:
        """Names the tokenizer: equal for equal vocabulary and settings."""
        return hashlib.sha256(f"{self.to_json()}{self.separator_id}".encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str], end_id: int) -> list[list[int]]:
        """The ids of each text, ended by `end_id` whether or not the tokenizer puts it there itself."""
        found = [encoding.ids for encoding in self._backend.encode_batch(texts)]
        return [ids if ids[-1:] == [end_id] else [*ids, end_id] for ids in found]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, nothing put around it."""
        return [found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def decode_all(self, ids: Iterable[int]) -> str:
        """The same with special tokens, by their names."""
        return self._backend.decode(list(ids), skip_special_tokens=False)
