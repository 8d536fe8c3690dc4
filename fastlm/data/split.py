"""Which text is for training and which for validation, decided by the text alone.

Whole documents go to validation, in the order of their hash, as many as fit into the fraction asked for. The
choice is then a fair sample of the corpus (the tail of a sorted list of files is not), the same on every
machine, and equal documents always go the same way, so none is both learnt and asked. Where documents are so
few or so large that whole ones give less than half of the fraction, the rest is the tail of the largest
document, cut after a line: nothing of the tail is in training, and every copy of that document is cut at the
same place.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from fastlm.data.corpus import DataError, Piece

__all__ = ["Progress", "Scan", "divide", "same_text", "scan", "training_bytes"]

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, bytes of text done, bytes of text in all, or 0 while that is not known)."""


@dataclass(frozen=True, eq=False)
class Scan:
    """What one pass over a corpus learns; 16 bytes a document.

    `sha256` names the corpus: its documents, their order and their boundaries. `digests` (documents,) uint64
    hold the head of each document's SHA-256, `sizes` (documents,) int64 its bytes in UTF-8.
    """

    sha256: str
    digests: np.ndarray
    sizes: np.ndarray

    @property
    def bytes(self) -> int:
        return int(self.sizes.sum())


def scan(pieces: Iterable[Piece], progress: Progress | None = None) -> Scan:
    """Hash and measure every document."""
    reader = _Reader()
    for piece in pieces:
        reader.add(piece)
        if progress:
            progress("reading", reader.bytes, 0)
    return reader.result()


def same_text(pieces: Iterable[Piece], expected: Scan) -> Iterator[Piece]:
    """Pass the pieces of a second reading on.

    Raises:
        DataError: a document is not the one that was scanned in its place.
    """
    reader = _Reader()
    documents = len(expected.digests)
    for piece in pieces:
        place = len(reader.digests)
        reader.add(piece)
        if place >= documents or (piece.last and reader.digests[place] != expected.digests[place]):
            raise DataError(f"{piece.source} changed while it was being read: start again")
        yield piece
    if len(reader.digests) < documents:
        raise DataError("the text became shorter while it was being read: start again")


def training_bytes(scan: Scan, fraction: float) -> np.ndarray:
    """How many leading bytes of each document are for training; the rest is for validation.

    Args:
        scan: the corpus.
        fraction: the part of all bytes that validation is to get, 0 <= fraction < 1.

    Returns:
        (documents,) int64: the document's size, 0, or for a document that is cut, something between.

    Raises:
        ValueError: `fraction` out of range.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the validation fraction must be at least 0 and below 1, got {fraction}")
    target = int(fraction * scan.bytes)
    _, first, group, copies = np.unique(
        scan.digests, return_index=True, return_inverse=True, return_counts=True
    )
    size = scan.sizes[first]
    left = target
    chosen = np.zeros(len(size), dtype=bool)
    for index, total in enumerate((size * copies).tolist()):
        if total <= left:
            chosen[index] = True
            left -= total
    keep = np.where(chosen, 0, size)
    if 2 * left > target:
        largest = int(np.argmax(keep))
        keep[largest] -= min(left // int(copies[largest]), int(keep[largest]))
    return keep[group]


def divide(pieces: Iterable[Piece], training: np.ndarray) -> Iterator[tuple[Piece, bool]]:
    """Send each piece to its side: (piece, is it validation). A document that is cut ends on both sides."""
    document = done = 0
    for piece in pieces:
        size = len(piece.text.encode())
        room = int(training[document]) - done
        at = _cut_at(piece.text, room, size)
        if at > 0:
            yield Piece(piece.text[:at], piece.source, piece.last or room <= size), False
        if at < len(piece.text):
            yield Piece(piece.text[at:], piece.source, piece.last), True
        done += size
        if piece.last:
            document, done = document + 1, 0


def _cut_at(text: str, room: int, size: int) -> int:
    """Where `text` of `size` bytes passes `room` bytes: after a line end, else after a character."""
    if room <= 0 or room >= size:
        return 0 if room <= 0 else len(text)
    at = len(text.encode()[:room].decode(errors="ignore"))
    line = text.find("\n", at) + 1
    return line if 0 < line < len(text) else max(at, 1)


class _Reader:
    def __init__(self) -> None:
        self.digests = array("Q")
        self._sizes = array("q")
        self._corpus = hashlib.sha256()
        self._document = hashlib.sha256()
        self._size = 0
        self.bytes = 0

    def add(self, piece: Piece) -> None:
        data = piece.text.encode()
        self._document.update(data)
        self._size += len(data)
        self.bytes += len(data)
        if piece.last:
            digest = self._document.digest()
            self._corpus.update(digest)
            self.digests.append(int.from_bytes(digest[:8], "big"))
            self._sizes.append(self._size)
            self._document, self._size = hashlib.sha256(), 0

    def result(self) -> Scan:
        digests = np.array(self.digests, dtype=np.uint64)
        return Scan(self._corpus.hexdigest(), digests, np.array(self._sizes, dtype=np.int64))
