"""WordPiece: BERT's tokenizer, which keeps words and not their white space.

The encoding is the `tokenizers` library's. What BERT adds to a text ([CLS], [SEP], padding) is a task's business and is
never added here. A special token that is spelt out in a text is text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlm.data.corpus import DataError
from fastlm.data.library import LibraryTokenizer, library

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

__all__ = ["WordPiece"]

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CONTINUES = "##"


class WordPiece(LibraryTokenizer):
    """A WordPiece tokenizer with BERT's five special tokens; made by `train` or `load`.

    Args:
        backend: a `tokenizers.Tokenizer`. Its settings for truncation, padding and special tokens are changed.
        name: what messages call it.

    Raises:
        DataError: it is no WordPiece, or a special token is missing.
    """

    def __init__(self, backend: Backend, name: str = "the tokenizer") -> None:
        model = json.loads(backend.to_str())["model"]
        if model.get("type") != "WordPiece":
            raise DataError(f"{name} is {model.get('type')}, not WordPiece")
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        if missing := [token for token in SPECIAL if token not in vocabulary]:
            raise DataError(f"{name} has no {', '.join(missing)}; BERT needs {', '.join(SPECIAL)}")
        backend.add_special_tokens(list(SPECIAL))  # known already: only marks them as special
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self.pad_id, self.unknown_id, self.cls_id, self.sep_id, self.mask_id = (vocabulary[t] for t in SPECIAL)
        self.separator_id = self.sep_id  # ends a document in a token file
        self._vocabulary = vocabulary
        prefix = model.get("continuing_subword_prefix") or _CONTINUES
        self._continuing = [i for token, i in self._vocabulary.items() if token.startswith(prefix)]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, lowercase: bool = True) -> WordPiece:
        """Learn a vocabulary from texts.

        Args:
            texts: read once, in bounded memory. A word does not reach over the end of a text.
            vocab_size: number of ids, more than the special tokens. Text that repeats too little gives fewer. Rare
                characters, beyond the most frequent 1000 or a quarter of vocab_size, are not known.
            lowercase: as BERT uncased: lower case, and no accents.
        """
        if vocab_size <= len(SPECIAL):
            raise ValueError(f"vocab_size must be more than {len(SPECIAL)}, got {vocab_size}")
        backend = _backend(library().models.WordPiece(unk_token="[UNK]"), lowercase)
        trainer = library().trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            limit_alphabet=max(1, min(1000, vocab_size // 4)),  # a character may be there twice, alone and continuing
            special_tokens=list(SPECIAL),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer=trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WordPiece:
        """Read a `tokenizer.json`, a `vocab.txt`, or a folder that holds one of them.

        With vocab.txt, tokenizer_config.json beside it may say `do_lower_case`; else, as in BERT, it is so.

        Raises:
            DataError: nothing there, not a tokenizer, or one that `WordPiece` refuses.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        words = path / "vocab.txt" if path.is_dir() else path
        # The library raises a bare Exception for whatever it dislikes.
        try:
            if file.is_file() and file.suffix != ".txt":
                backend = library().Tokenizer.from_str(file.read_text(encoding="utf-8"))
            elif words.is_file():
                settings = words.with_name("tokenizer_config.json")
                said = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
                tokens = words.read_text(encoding="utf-8").splitlines()
                vocabulary = {token: identifier for identifier, token in enumerate(tokens)}
                model = library().models.WordPiece(vocab=vocabulary, unk_token="[UNK]")
                backend = _backend(model, said.get("do_lower_case", True))
            else:
                raise DataError(f"no tokenizer at {path}: looked for tokenizer.json, or vocab.txt")
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"cannot load a tokenizer from {path}: {error}") from error
        return cls(backend, name=f"the tokenizer {path}")

    @cached_property
    def sha256(self) -> str:
        """Names the tokenizer: equal for equal vocabulary and settings."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._vocabulary.values()) + 1

    @cached_property
    def continues(self) -> np.ndarray:
        """(vocab_size,) bool: whether an id continues a word."""
        table = np.zeros(self.vocab_size, dtype=bool)
        table[self._continuing] = True
        return table

    @cached_property
    def ordinary(self) -> np.ndarray:
        """The ids that are not special, ascending."""
        special = {*self._backend.get_added_tokens_decoder()}
        return np.array(sorted({*self._vocabulary.values()} - special), dtype=np.int64)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, nothing added."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        return [found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_words(self, words: Sequence[str]) -> tuple[list[int], list[int]]:
        """(ids, for each the place of its word) of a text that comes in words. A word may have no id."""
        found = self._backend.encode(list(words), is_pretokenized=True, add_special_tokens=False)
        return found.ids, [word for word in found.word_ids if word is not None]

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, for each the first character of the text that it stands for and the one after the last)."""
        found = self._backend.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def decode(self, ids: Iterable[int]) -> str:
        """Words apart by spaces; special tokens by their names."""
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text


def _backend(model: Any, lowercase: bool) -> Backend:
    backend: Backend = library().Tokenizer(model)
    backend.normalizer = library().normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = library().pre_tokenizers.BertPreTokenizer()
    backend.decoder = library().decoders.WordPiece()
    return backend
