"""From sources to tokens, through the cache: read, split, learn a tokenizer, encode.

Each result is kept under a name that is a hash of all that went into it, so nothing stale is ever used: the
tokenizer under the training text and its settings, the tokens under the corpus, the tokenizer and the split.
The text itself is read and hashed every time (about 0.1 s for the standard library), because a time stamp
proves nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar, cast

import numpy as np

from fastlm.data.cache import cache_dir, exclusive, written_whole
from fastlm.data.codec import Codec
from fastlm.data.corpus import Corpus, DataError, Piece
from fastlm.data.split import Progress, Scan, divide, same_text, scan, training_bytes
from fastlm.data.tokenizer import Tokenizer
from fastlm.data.tokens import Origin, TokenFile, TokenSplit, TokenWriter, open_tokens
from fastlm.data.wordpiece import WordPiece

__all__ = ["Dataset", "learn_tokenizer", "prepare"]

BATCH_CHARS = 1 << 20
# More text teaches a vocabulary little and takes long: of a larger corpus every n-th piece is learnt from.
LEARN_BYTES = 1 << 26
CACHE_VERSION = 1
BYTES = "bytes"

logger = logging.getLogger(__name__)
T = TypeVar("T")
K = TypeVar("K", bound=Tokenizer | WordPiece)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A tokenized corpus. `source` says in words where the text came from, `path` is the token file."""

    source: str
    path: Path
    tokenizer: Tokenizer | WordPiece | Codec
    training: TokenSplit
    validation: TokenSplit


def prepare(
    sources: Sequence[str | os.PathLike[str]] | None = None,
    *,
    field: str = "text",
    tokenizer: Tokenizer | WordPiece | Codec | str | os.PathLike[str] | None = None,
    kind: type[Tokenizer] | type[WordPiece] = Tokenizer,
    vocab_size: int = 4096,
    validation_fraction: float = 0.05,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Tokens of a corpus, from the cache or made now.

    Any number of processes may call this at once: one works, the others wait and take its result.

    Args:
        sources, field: as for `Corpus`.
        tokenizer: None learns one of `vocab_size` from the training text (never from validation text);
            "bytes" is `Tokenizer.of_bytes()`; else a tokenizer, or the path of one.
        kind: what is learned or loaded: byte-level BPE, or WordPiece.
        vocab_size: for learning.
        validation_fraction: the part of the text, in bytes, kept from training, 0 <= fraction < 1.
        cache: the folder of the cache, see `cache_dir`.
        progress: called often, with the stages "reading", "learning tokens" and "tokenizing".

    Raises:
        DataError: anything wrong with the text, the tokenizer or the cache.
        ValueError: `vocab_size` or `validation_fraction` out of range.
    """
    folder = cache_dir(cache)
    corpus = Corpus(sources, field)
    found = scan(corpus.pieces(), progress)
    job = _Job(corpus, found, training_bytes(found, validation_fraction), folder, progress)
    if tokenizer is None:
        tokenizer = job.learn(kind, vocab_size, validation_fraction)
    elif tokenizer == BYTES and kind is Tokenizer:
        tokenizer = Tokenizer.of_bytes()
    elif not isinstance(tokenizer, Tokenizer | WordPiece | Codec):
        tokenizer = kind.load(tokenizer)
    tokens = job.encode(tokenizer, validation_fraction)
    return Dataset(corpus.name, tokens.path, tokenizer, tokens.training, tokens.validation)


@dataclass
class _Job:
    corpus: Corpus
    scan: Scan
    training: np.ndarray
    cache: Path
    progress: Progress | None

    def pieces(self, stage: str) -> Iterator[tuple[Piece, bool]]:
        """The text once more, as (piece, is it validation)."""
        done = 0
        for piece, validation in divide(same_text(self.corpus.pieces(), self.scan), self.training):
            yield piece, validation
            done += len(piece.text.encode())
            if self.progress:
                self.progress(stage, done, self.scan.bytes)

    def learn(
        self, kind: type[Tokenizer] | type[WordPiece], vocab_size: int, fraction: float
    ) -> Tokenizer | WordPiece:
        named = [] if kind is Tokenizer else [kind.__name__]
        texts = (piece.text for piece, validation in self.pieces("learning tokens") if not validation)
        size = int(self.training.sum())
        return _learned(kind, texts, size, vocab_size, self.cache, self.scan.sha256, fraction, vocab_size, named=named)

    def encode(self, tokenizer: Tokenizer | WordPiece | Codec, fraction: float) -> TokenFile:
        origin = Origin(
            self.scan.sha256, tokenizer.sha256, tokenizer.vocab_size, tokenizer.separator_id, float(fraction)
        )

        def make(path: Path) -> None:
            # The second file has no name, so that a kill leaves nothing of it.
            with written_whole(path) as file, tempfile.TemporaryFile(dir=path.parent) as aside:
                writer = TokenWriter(file, aside, origin)
                for batch in _batches(self.pieces("tokenizing")):
                    _encode(batch, tokenizer, writer)
                writer.finish()

        def read(path: Path) -> TokenFile:
            tokens = open_tokens(path)
            if tokens.origin != origin:
                raise DataError(f"{path} was made from something else: {tokens.origin}")
            return tokens

        return _kept(self.cache / "tokens" / f"{_key(asdict(origin))}.tokens", make, read)


def learn_tokenizer(
    texts: Sequence[str], vocab_size: int, cache: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """A byte-level BPE learned from these texts, from the cache or made now; see `Tokenizer.train`.

    cache: the folder of the cache, see `cache_dir`. DataError if it cannot be used.
    """
    digest, size = hashlib.sha256(), 0
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
        size += len(data)
    return _learned(Tokenizer, texts, size, vocab_size, cache_dir(cache), "texts", digest.hexdigest(), vocab_size)


def _learned(
    kind: type[K], texts: Iterable[str], size: int, vocab_size: int, cache: Path, *key: object, named: Sequence[str] = ()
) -> K:
    """A tokenizer learned from texts of so many bytes, kept under `key`; texts are read only if it is not there."""
    import tokenizers

    def make(path: Path) -> None:
        step = max(1, -(-size // LEARN_BYTES))
        text = kind.train(islice(texts, 0, None, step), vocab_size).to_json()
        with written_whole(path) as file:
            file.write(f"{_sha256(text)}\n{text}".encode())

    name = _key(*key, tokenizers.__version__, *named)
    return _kept(cache / "tokenizers" / f"{name}.txt", make, partial(_read_tokenizer, kind))


def _kept(path: Path, make: Callable[[Path], None], read: Callable[[Path], T]) -> T:
    """Read what is kept at `path`; where it is missing or unusable, make it first."""
    try:
        with exclusive(path):
            try:
                return read(path)
            except FileNotFoundError:
                pass
            except DataError as error:
                logger.warning("unusable cache file, making it again: %s", error)
            make(path)
            return read(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def _read_tokenizer(kind: type[K], path: Path) -> K:
    digest, _, text = path.read_bytes().decode(errors="replace").partition("\n")
    if digest != _sha256(text):
        raise DataError(f"{path} is truncated or damaged: it does not match its SHA-256")
    return cast(K, kind.from_json(text))


def _batches(pieces: Iterable[tuple[Piece, bool]]) -> Iterator[list[tuple[Piece, bool]]]:
    batch, chars = [], 0
    for item in pieces:
        batch.append(item)
        chars += len(item[0].text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _encode(batch: list[tuple[Piece, bool]], tokenizer: Tokenizer | WordPiece | Codec, writer: TokenWriter) -> None:
    encoded = tokenizer.encode_batch([piece.text for piece, _ in batch])
    for side in (False, True):
        ids: list[int] = []
        documents = size = 0
        for (piece, validation), found in zip(batch, encoded, strict=True):
            if validation == side:
                ids += found
                size += len(piece.text.encode())
                if piece.last:
                    ids.append(tokenizer.separator_id)
                    documents += 1
        tokens = np.array(ids, dtype=np.uint32)
        if isinstance(tokenizer, Tokenizer) and (got := int(tokenizer.bytes_per_token[tokens].sum())) != size:
            raise DataError(
                f"the tokenizer does not keep the text: {size} bytes up to {batch[-1][0].source} became {got}"
            )
        writer.write(tokens, validation=side, documents=documents, size=size)


def _key(*parts: object) -> str:
    return _sha256(json.dumps([CACHE_VERSION, *parts], sort_keys=True))[:32]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
