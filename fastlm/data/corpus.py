"""Text in: files, folders, globs, data by name or Python's own standard library become a stream of documents.

A document is one text file, or one record of a `.jsonl` file or of an `hf:` name (hub.py). It arrives as `Piece`s of
about 16 Ki characters, the last of which says so: a file of any size passes through bounded memory. A piece ends before a
space that follows a visible character. Byte-level pre-tokenizers (GPT-2's and those after it) end a word
there anyway, so cutting changes no token; only text that runs on for a mebi-character without such a place is
cut elsewhere.

Nothing is repaired on the way: text that is not UTF-8, a NUL byte, a malformed record or a file that cannot
be read stops the reading with an error that names the file and, where there is one, the line or the byte.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import os
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from fastlm.data.errors import DataError
from fastlm.data.hub import is_named, named_rows

__all__ = [
    "RECORD_SUFFIXES",
    "TEXT_SUFFIXES",
    "Corpus",
    "DataError",
    "Piece",
    "json_records",
    "not_utf8",
    "opened",
    "read_corpus",
    "suffix_of",
]

READ_BYTES = 1 << 20
PIECE_CHARS = 1 << 14
LONGEST_PIECE = 1 << 20

RECORD_SUFFIXES = frozenset({".jsonl", ".ndjson"})
TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst", ".tex", ".py"}) | RECORD_SUFFIXES

# Test packages are installed apart from the rest by several distributions; the others differ from machine to
# machine.
_NO_STANDARD_LIBRARY = re.compile(
    r"tests?|idle_test|(site|dist)-packages|__pycache__|config-.*|_sysconfigdata_.*|(site|user)customize\.py"
)
_HIDDEN = re.compile(r"\..*")
_WORD_END = re.compile(r"(?<=\S)(?= )")
_LINE_END = re.compile(r"(?<=\S)(?=\n)")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one document: `text` is never empty, `last` ends the document, `source` names it."""

    text: str
    source: str
    last: bool


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    named: bool  # given by its name, and so an error when empty; a folder or a glob may well meet empty files


class Corpus:
    """The documents of some sources, in a fixed order; each pass over `pieces()` reads the files anew.

    Args:
        sources: files, folders, globs and `hf:` names, read in this order, what is met twice once. Folders are
            walked in sorted order for `TEXT_SUFFIXES`, each also with `.gz`, leaving out hidden names. A file
            is `.jsonl` by its suffix and otherwise text. None or nothing: the Python files of the running
            interpreter's standard library without its test packages (another version of Python, or a
            distribution that installs parts such as `tkinter` apart, has a somewhat different text).
        field: the key of a `.jsonl` record, or the column of an `hf:` name, that holds its text.

    Raises:
        DataError: a source that does not exist, matches nothing, or is neither a regular file nor a folder.
    """

    def __init__(self, sources: Sequence[str | os.PathLike[str]] | None = None, field: str = "text") -> None:
        if isinstance(sources, str | os.PathLike):
            raise TypeError(
                f"sources must be a sequence of paths, got the single path {os.fspath(sources)!r}"
            )
        self.field = field
        if sources:
            self.name = ", ".join(os.fspath(source) for source in sources)
            found: Iterable[_File] = (file for source in sources for file in _find(os.fspath(source)))
        else:
            self.name = f"the standard library of Python {platform.python_version()}"
            found = _standard_library()
        files: dict[str, _File] = {}
        for file in found:
            files.setdefault(file.path if is_named(file.path) else os.path.realpath(file.path), file)
        self._files = list(files.values())
        self.paths = [file.path for file in self._files]

    def pieces(self) -> Iterator[Piece]:
        """Stream every document in order.

        Raises:
            DataError: a file that is unreadable, not UTF-8, binary, malformed, or empty though given by name;
                a record without `field`; no text at all.
        """
        any_text = False
        for file in self._files:
            empty = True
            for piece in _read_file(file.path, self.field):
                empty = False
                yield piece
            if empty and file.named:
                raise DataError(f"{file.path} is empty: it holds no text")
            any_text |= not empty
        if not any_text:
            raise DataError(f"{self.name}: no text, all files found ({len(self._files)}) are empty")


def read_corpus(
    sources: Sequence[str | os.PathLike[str]] | None = None, field: str = "text"
) -> Iterator[Piece]:
    """The pieces of `Corpus(sources, field)`."""
    return Corpus(sources, field).pieces()


def _standard_library() -> Iterator[_File]:
    root = sysconfig.get_path("stdlib")
    names = [path for path in _walk(root, _NO_STANDARD_LIBRARY) if path.endswith(".py")]
    if not names:
        raise DataError(f"Python's standard library has no source files under {root}: name files with --data")
    return (_File(name, named=False) for name in names)


def _find(source: str) -> Iterator[_File]:
    if is_named(source):
        yield _File(source, named=True)
        return
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        names = [name for name in _walk(path, _HIDDEN) if suffix_of(name) in TEXT_SUFFIXES]
        if not names:
            suffixes = " ".join(sorted(TEXT_SUFFIXES))
            raise DataError(f"the folder {source} holds no text files (looked for {suffixes}, also with .gz)")
        yield from (_File(name, named=False) for name in names)
    elif os.path.lexists(path):
        yield _File(_regular(path), named=True)
    elif glob.has_magic(path):
        names = sorted(name for name in glob.glob(path, recursive=True) if not os.path.isdir(name))
        if not names:
            raise DataError(f"the pattern {source} matches no file")
        yield from (_File(_regular(name), named=False) for name in names)
    else:
        raise DataError(f"no such file or folder: {source}")


def _regular(path: str) -> str:
    if not os.path.isfile(path):  # a pipe may never end, and nothing could be read from it a second time
        raise DataError(f"{path} is not a regular file")
    return path


def _walk(root: str, skip: re.Pattern[str]) -> Iterator[str]:
    """Files below `root` in an order that depends on names alone, without the names that `skip` matches."""

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot list the folder {error.filename}: {error.strerror}") from error

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = sorted(name for name in subfolders if not skip.fullmatch(name))
        for name in sorted(names):
            path = os.path.join(folder, name)
            if not skip.fullmatch(name) and os.path.isfile(path):
                yield path


def suffix_of(name: str) -> str:
    """The suffix of a file name in lower case, that before .gz if it ends so."""
    return Path(name.lower().removesuffix(".gz")).suffix


def _read_file(path: str, field: str) -> Iterator[Piece]:
    if is_named(path):
        records: Iterable[tuple[str, object]] = named_rows(path, [field])
    elif suffix_of(path) in RECORD_SUFFIXES:
        records = ((f"{path}:{number}", record) for number, record in json_records(path))
    else:
        yield from _cut(_read_text(path), path)
        return
    for where, record in records:
        yield from _cut([_field_of(record, field, where)], where)


def _cut(texts: Iterable[str], source: str) -> Iterator[Piece]:
    """Join the texts of one document and cut them anew into pieces."""
    rest = ""
    for text in texts:
        rest += text
        start = 0
        # A character must be left over, for only the end of the texts tells which piece is the last.
        while (end := _piece_end(rest, start)) < len(rest):
            yield Piece(rest[start:end], source, last=False)
            start = end
        rest = rest[start:]
    if rest:
        yield Piece(rest, source, last=True)


def _piece_end(text: str, start: int) -> int:
    """Where the piece that begins at `start` ends; `len(text)` when more text is needed to tell."""
    limit = start + LONGEST_PIECE
    for boundary in (_WORD_END, _LINE_END):
        if found := boundary.search(text, start + PIECE_CHARS, limit):
            return found.start()
        if len(text) < limit:
            return len(text)
    return limit


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed if its name ends in .gz; DataError where it cannot be read."""
    try:
        with cast(BinaryIO, gzip.open(path)) if path.lower().endswith(".gz") else open(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _read_text(path: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = 0
    with opened(path) as file:
        while True:
            data = file.read(READ_BYTES)
            if (nul := data.find(0)) >= 0:
                raise DataError(f"{path} is binary, not text: byte {read + nul} is NUL")
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise DataError(not_utf8(path, error, read - held)) from error
            if read == 0:
                text = text.removeprefix("\ufeff")
            read += len(data)
            if text:
                yield text
            if not data:
                return


def not_utf8(where: str, error: UnicodeDecodeError, base: int) -> str:
    byte = error.object[error.start]
    return f"{where} is not UTF-8 text: byte {base + error.start} (0x{byte:02x}), {error.reason}"


def json_records(path: str) -> Iterator[tuple[int, object]]:
    """(line number, value) of each line of a JSON Lines file that is not blank."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if b"\0" in line:
                raise DataError(f"{where} is binary, not JSON: byte {line.index(0)} of the line is NUL")
            try:
                text = line.decode().removeprefix("\ufeff" if number == 1 else "")
                if text.strip():
                    yield number, json.loads(text)
            except UnicodeDecodeError as error:
                raise DataError(not_utf8(where, error, 0)) from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: malformed JSON: {error}") from error


def _field_of(record: object, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise DataError(f"{where}: a record must be a JSON object, got {type(record).__name__}")
    if field not in record:
        raise DataError(
            f"{where}: no field {field!r}; the record has {', '.join(map(repr, record)) or 'no fields'}"
        )
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {field!r} is not Unicode text: a lone surrogate at {error.start}"
        ) from error
    return text
