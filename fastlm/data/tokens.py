"""The file that tokens are kept in, and its memory map.

    bytes 0-7     b"fastlmTK"
    bytes 8-15    length of the JSON header and its CRC-32, two little-endian 32-bit numbers
    bytes 16-     the JSON header: what is in the file, and what it was made from
    bytes 4096-   the training tokens, then the validation tokens: little-endian, 16 bits where the vocabulary
                  allows, else 32

Each split carries the SHA-256 of its tokens. A file is refused, with the reason, when it is not one of ours,
is too short or too long, or does not match a hash. It appears under its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastlm.data.corpus import DataError

__all__ = ["Origin", "TokenFile", "TokenFileError", "TokenSplit", "TokenWriter", "fingerprint", "open_tokens"]

MAGIC = b"fastlmTK"
VERSION = 1
HEADER_BYTES = 4096
_PREFIX = struct.Struct("<8sII")
_HASH_TOKENS = 1 << 22


class TokenFileError(DataError):
    """A token file that cannot be trusted: foreign, truncated or altered."""


@dataclass(frozen=True)
class Origin:
    """What tokens were made from: the SHA-256 of the corpus, that of the tokenizer, the ids, the split."""

    corpus: str
    tokenizer: str
    vocab_size: int
    separator_id: int
    validation_fraction: float


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """Tokens in the order of the corpus, the separator after each document.

    `tokens` (count,) uint16 or uint32, read-only and mapped from the file; `documents` and `bytes` are what
    they encode (bytes of text in UTF-8, separators count none); `sha256` is that of the tokens as they lie in
    the file.
    """

    name: str
    tokens: np.ndarray
    documents: int
    bytes: int
    sha256: str


@dataclass(frozen=True, eq=False)
class TokenFile:
    path: Path
    origin: Origin
    training: TokenSplit
    validation: TokenSplit


def token_dtype(vocab_size: int) -> np.dtype:
    """The little-endian type that tokens of a vocabulary are kept in."""
    if not 0 < vocab_size <= 1 << 32:
        raise ValueError(f"vocab_size must be between 1 and 2**32, got {vocab_size}")
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def fingerprint(tokens: np.ndarray) -> str:
    """SHA-256 of the bytes of a one-dimensional array, in bounded memory."""
    digest = hashlib.sha256()
    for start in range(0, len(tokens), _HASH_TOKENS):
        digest.update(np.ascontiguousarray(tokens[start : start + _HASH_TOKENS]).data)
    return digest.hexdigest()


class _Side:
    """One split while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.tokens = self.documents = self.bytes = 0
        self.digest = hashlib.sha256()

    def header(self) -> dict[str, int | str]:
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "sha256": self.digest.hexdigest(),
        }


class TokenWriter:
    """Fills a token file that is open for writing; `finish` makes it valid.

    The two splits may be written in any order: validation waits in `aside`, a second file open for both.
    """

    def __init__(self, file: BinaryIO, aside: BinaryIO, origin: Origin) -> None:
        self._dtype = token_dtype(origin.vocab_size)
        self._origin = origin
        file.seek(HEADER_BYTES)
        self._sides = _Side(file), _Side(aside)

    def write(self, tokens: np.ndarray, *, validation: bool, documents: int, size: int) -> None:
        """Append tokens, which hold so many ends of documents and encode `size` bytes of text.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        if not len(tokens):
            return
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._origin.vocab_size:
            raise ValueError(f"token ids must be in [0, {self._origin.vocab_size}), got {low} to {high}")
        data = tokens.astype(self._dtype)
        side = self._sides[validation]
        side.file.write(data.data)
        side.digest.update(data.data)
        side.tokens += len(data)
        side.documents += documents
        side.bytes += size

    def finish(self) -> None:
        training, validation = self._sides
        validation.file.seek(0)
        shutil.copyfileobj(validation.file, training.file, 1 << 20)
        header = json.dumps(
            {
                "version": VERSION,
                "dtype": self._dtype.str,
                "origin": asdict(self._origin),
                "training": training.header(),
                "validation": validation.header(),
            }
        ).encode()
        prefix = _PREFIX.pack(MAGIC, len(header), zlib.crc32(header))
        training.file.seek(0)
        training.file.write((prefix + header).ljust(HEADER_BYTES, b"\0"))


def open_tokens(path: str | os.PathLike[str]) -> TokenFile:
    """Map a token file, having compared all of it with its hashes (about 1 GB/s).

    Raises:
        FileNotFoundError: no such file.
        TokenFileError: not a token file, or not as it was written.
    """
    path = Path(path)
    header = _header(path)
    dtype = np.dtype(header["dtype"])
    counts = [header[name]["tokens"] for name in ("training", "validation")]
    expected, size = HEADER_BYTES + dtype.itemsize * sum(counts), path.stat().st_size
    if size != expected:
        raise TokenFileError(
            f"{path} is {'truncated' if size < expected else 'too long'}: {size} of {expected} bytes"
        )
    mapped = np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=(sum(counts),)).view(np.ndarray)
    splits = []
    for name, tokens in zip(("training", "validation"), np.split(mapped, counts[:1]), strict=True):
        fields = {key: value for key, value in header[name].items() if key != "tokens"}
        split = TokenSplit(name, tokens, **fields)
        if fingerprint(tokens) != split.sha256:
            raise TokenFileError(f"{path} is damaged: its {name} tokens do not match their SHA-256")
        splits.append(split)
    return TokenFile(path, Origin(**header["origin"]), *splits)


def _header(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        block = file.read(HEADER_BYTES)
    if not block.startswith(MAGIC):
        raise TokenFileError(f"{path} is not a token file: it begins with {block[:8]!r}")
    if len(block) < HEADER_BYTES:
        raise TokenFileError(f"{path} is truncated: {len(block)} bytes, less than its header")
    _, length, crc = _PREFIX.unpack_from(block)
    text = block[_PREFIX.size : _PREFIX.size + length]
    if zlib.crc32(text) != crc:
        raise TokenFileError(f"{path} is damaged: its header does not match its CRC-32")
    header: dict[str, Any] = json.loads(text)
    if header["version"] != VERSION:
        raise TokenFileError(f"{path} has format version {header['version']}, this program reads {VERSION}")
    return header
