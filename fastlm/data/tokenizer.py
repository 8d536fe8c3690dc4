"""Byte-level byte-pair encoding: text to token ids and back, with no text lost and none unknown.

The encoding itself is done by the `tokenizers` library. Around it this file keeps three promises. Every
string comes back as it was, also one that spells the name of a special token: only `separator_id`, put
between documents by us, is ever special. A tokenizer that cannot promise that (a normalizer, an added space,
a missing byte) is refused when it is loaded. And every id knows how many bytes of text it stands for, so that
a loss in nats per token becomes bits per byte exactly, on any range of tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlm.data.corpus import DataError
from fastlm.data.library import LibraryTokenizer, library

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

__all__ = ["SEPARATOR", "Tokenizer"]

SEPARATOR = "<|endoftext|>"
SMALLEST_VOCABULARY = 257
"""One token for each byte and the separator."""


class Tokenizer(LibraryTokenizer):
    """A byte-level BPE tokenizer; made by `train`, `of_bytes` or `load`.

    Args:
        backend: a `tokenizers.Tokenizer`. Its settings for truncation, padding and special tokens are
            changed.
        separator: the token that ends every document, in the vocabulary of `backend`.
        name: what messages call it.

    Raises:
        DataError: it is not byte-level, so some text would not come back, or it has no such separator.
    """

    def __init__(self, backend: Backend, separator: str = SEPARATOR, name: str = "the tokenizer") -> None:
        identifier = backend.token_to_id(separator)
        if identifier is None:
            raise DataError(
                f"{name} has no token {separator!r} to put between documents: name the one that it has"
            )
        backend.add_special_tokens([separator])  # known already: only marks it as special
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # spelt out in a text, it is text
        self._backend = backend
        self.separator = separator
        self.separator_id = identifier
        self._token_bytes = _token_bytes(backend, separator, name)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from texts; the same texts give the same tokenizer.

        Args:
            texts: read once, in bounded memory. A word does not reach over the end of a text.
            vocab_size: number of token ids, at least 257. Text that repeats too little gives fewer.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocab_size must be at least {SMALLEST_VOCABULARY} (bytes and separator), got {vocab_size}"
            )
        backend = _byte_level(library().models.BPE())
        trainer = library().trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[SEPARATOR],
            initial_alphabet=sorted(_ALPHABET),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer=trainer)
        return cls(backend)

    @classmethod
    def of_bytes(cls) -> Tokenizer:
        """The tokenizer that needs no training: an id below 256 is that byte, 256 is the separator."""
        vocabulary = {character: byte for character, byte in _ALPHABET.items()}
        backend = _byte_level(library().models.BPE(vocab=vocabulary, merges=[]))
        backend.add_special_tokens([SEPARATOR])
        return cls(backend)

    @classmethod
    def load(cls, path: str | os.PathLike[str], separator: str = SEPARATOR) -> Tokenizer:
        """Read a `tokenizer.json`, or a folder that holds one or else GPT-2's `vocab.json` and `merges.txt`.

        Raises:
            DataError: nothing there, not a tokenizer, or one that `Tokenizer` refuses.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        vocabulary, merges = path / "vocab.json", path / "merges.txt"
        # The library raises a bare Exception for whatever it dislikes.
        try:
            if file.is_file():
                backend = library().Tokenizer.from_str(file.read_text(encoding="utf-8"))
            elif vocabulary.is_file() and merges.is_file():
                backend = _byte_level(library().models.BPE.from_file(str(vocabulary), str(merges)))
            else:
                raise DataError(
                    f"no tokenizer at {path}: looked for tokenizer.json, or vocab.json with merges.txt"
                )
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"cannot load a tokenizer from {path}: {error}") from error
        return cls(backend, separator, name=f"the tokenizer {path}")

    def with_tokens(self, names: Sequence[str]) -> Tokenizer:
        """The same tokenizer with further special tokens, whose ids follow the others in this order.

        Raises:
            DataError: a name that is in the vocabulary.
        """
        backend = library().Tokenizer.from_str(self.to_json())
        if known := [name for name in names if backend.token_to_id(name) is not None]:
            raise DataError(f"the tokenizer has a token {known[0]!r} already")
        backend.add_special_tokens(list(names))
        return Tokenizer(backend, self.separator)

    @cached_property
    def sha256(self) -> str:
        """Names the tokenizer: equal for equal vocabulary, merges and settings."""
        return hashlib.sha256(f"{self.to_json()}{self.separator}".encode()).hexdigest()

    def files(self) -> dict[str, str]:
        """With sentinels also the settings by which transformers takes it for what it is, and not for T5's own kind."""
        found = super().files()
        if self.sentinels:
            settings = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": self.separator,
                "pad_token": "<pad>",
                "extra_special_tokens": [f"<extra_id_{i}>" for i in range(len(self.sentinels))],
            }
            found["tokenizer_config.json"] = json.dumps(settings, indent=1) + "\n"
        return found

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self._token_bytes)

    @cached_property
    def bytes_per_token(self) -> np.ndarray:
        """(vocab_size,) int64: the bytes of text an id stands for, 0 for the separator and its like."""
        special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        sizes = [0 if i in special else len(data) for i, data in enumerate(self._token_bytes)]
        return np.array(sizes, dtype=np.int64)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without a separator."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        return [found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text of some ids. Special tokens appear by their names.

        Args:
            ids: a tensor, an array or a sequence; may begin and end inside a character.
            errors: what to do there, as in `bytes.decode`.

        Raises:
            IndexError: an id outside the vocabulary.
        """
        return b"".join(self._bytes_of(ids)).decode(errors=errors)

    def _bytes_of(self, ids: Iterable[int]) -> Iterator[bytes]:
        for identifier in map(int, ids):
            if not 0 <= identifier < self.vocab_size:
                raise IndexError(f"token id {identifier} is outside the vocabulary of {self.vocab_size}")
            yield self._token_bytes[identifier]


def _byte_level(model: Any) -> Backend:
    backend: Backend = library().Tokenizer(model)
    backend.pre_tokenizer = library().pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = library().decoders.ByteLevel()
    return backend


def _token_bytes(backend: Backend, separator: str, name: str) -> list[bytes]:
    """The bytes that each id stands for; b"" for an id that no token has."""
    settings = json.loads(backend.to_str())
    faults = _faults(settings)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = {identifier: token.content for identifier, token in backend.get_added_tokens_decoder().items()}
    table = [b""] * (max(vocabulary.values()) + 1)
    for token, identifier in vocabulary.items():
        if identifier in added:
            table[identifier] = token.encode()
        elif all(character in _ALPHABET for character in token):
            table[identifier] = bytes(_ALPHABET[character] for character in token)
        else:
            faults.append(f"the token {token!r} is not made of bytes")
    if missing := sum(character not in vocabulary for character in _ALPHABET):
        faults.append(f"{missing} of the 256 bytes have no token")
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise DataError(
            f"{name} is not byte-level, text would not come back as it was: {'; '.join(faults[:3])}{more}"
        )
    return table


def _faults(settings: dict[str, Any]) -> list[str]:
    faults = []
    if settings["model"]["type"] != "BPE":
        faults.append(f"its model is {settings['model']['type']}, not BPE")
    if settings["model"].get("dropout"):
        faults.append("it drops merges at random")
    if settings["normalizer"] is not None:
        faults.append(f"it normalizes text ({settings['normalizer']['type']})")
    first = settings["pre_tokenizer"] or {"type": "none"}
    steps = first.get("pretokenizers", [first])
    levels = [step for step in steps if step["type"] == "ByteLevel"]
    if not levels:
        faults.append(f"its pre-tokenizer is {first['type']}, not ByteLevel")
    if any(step["add_prefix_space"] for step in levels):
        faults.append("it puts a space before the text")
    return faults


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's visible stand-in for each byte: itself where Latin-1 shows it, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_ALPHABET = _byte_alphabet()
