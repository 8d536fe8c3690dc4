"""Labelled data in: JSON Lines, CSV, TSV, columns of words and tags, SQuAD's questions, and each of them from `hf:` names.

Every record comes with the place it was read from, and nothing is repaired: a row with a field too many or too few, a
column that is not there, a value of another type stops the reading with an error that names the file and the line.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastlm.data.corpus import RECORD_SUFFIXES, Corpus, DataError, json_records, not_utf8, opened, suffix_of
from fastlm.data.hub import is_named, named_rows

__all__ = ["Question", "Record", "Sentence", "read_lines", "read_questions", "read_records", "read_tagged"]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True, slots=True)
class Record:
    """Some fields of one record; `where` is file:line, or a row of an `hf:` name."""

    where: str
    fields: dict[str, Any]

    def text(self, name: str) -> str:
        """A field that must be a string."""
        value = self.fields[name]
        if not isinstance(value, str):
            raise DataError(f"{self.where}: field {name!r} must be a string, got {type(value).__name__}")
        return value

    def label(self, name: str) -> str:
        """A field that names a class: a string or an integer."""
        value = self.fields[name]
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise DataError(f"{self.where}: field {name!r} must be a string or an integer, got {value!r}")
        return str(value)


@dataclass(frozen=True, slots=True)
class Sentence:
    """Words and a tag for each."""

    where: str
    words: list[str]
    tags: list[str]


@dataclass(frozen=True, slots=True)
class Question:
    """A question on a context; `answers` are (text, first character in the context), none if it has no answer."""

    where: str
    question: str
    context: str
    answers: list[tuple[str, int]]


def read_records(sources: Sequence[str | os.PathLike[str]], columns: Sequence[str]) -> Iterator[Record]:
    """The records of .jsonl, .ndjson, .csv and .tsv files, each also with .gz, and of `hf:` names; all have all `columns`.

    The first row of a .csv or .tsv names its columns. In a .tsv a quotation mark is a character like any other.

    Raises:
        DataError: a file of another kind, unreadable, malformed or without records; a column that is not there.
    """
    for path in Corpus(sources).paths:
        suffix, found = suffix_of(path), False
        if is_named(path):
            rows: Iterator[Record] = (Record(*row) for row in named_rows(path, columns))
        elif suffix in RECORD_SUFFIXES:
            rows = _objects(path)
        elif suffix in _DELIMITERS:
            rows = _rows(path, _DELIMITERS[suffix])
        else:
            allowed = " ".join(sorted({*RECORD_SUFFIXES, *_DELIMITERS}))
            raise DataError(f"{path}: records are read from {allowed}, also with .gz, and from hf: names")
        for record in rows:
            for name in columns:
                if name not in record.fields:
                    there = ", ".join(map(repr, record.fields)) or "no fields"
                    raise DataError(f"{record.where}: no field {name!r}; the record has {there}")
            found = True
            yield record
        if not found:
            raise DataError(f"{path} holds no records")


def _objects(path: str) -> Iterator[Record]:
    for number, value in json_records(path):
        where = f"{path}:{number}"
        if not isinstance(value, dict):
            raise DataError(f"{where}: a record must be a JSON object, got {type(value).__name__}")
        yield Record(where, value)


def _rows(path: str, delimiter: str) -> Iterator[Record]:
    quotes = {"quoting": csv.QUOTE_NONE} if delimiter == "\t" else {}
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True, **quotes)  # type: ignore[arg-type]
    header: list[str] = []
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if not row:
                continue
            if not header:
                header = row
                if len(set(header)) != len(header):
                    raise DataError(f"{where}: two columns have one name: {', '.join(header)}")
                continue
            if len(row) != len(header):
                raise DataError(f"{where}: {len(row)} fields where the first row names {len(header)} columns")
            yield Record(where, dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: malformed: {error}") from error


def read_lines(path: str) -> Iterator[str]:
    """The lines of a text file, also with .gz, without their ends; DataError where it is not UTF-8 text."""
    for line in _lines(path):
        yield line.removesuffix("\n").removesuffix("\r")


def _lines(path: str) -> Iterator[str]:
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if b"\0" in line:
                raise DataError(f"{path}:{number} is binary, not text: byte {line.index(0)} of the line is NUL")
            try:
                yield line.decode().removeprefix("\ufeff" if number == 1 else "")
            except UnicodeDecodeError as error:
                raise DataError(not_utf8(f"{path}:{number}", error, 0)) from error


def read_tagged(
    sources: Sequence[str | os.PathLike[str]], word_column: int = 0, tag_column: int = -1, *,
    words_field: str = "tokens", tags_field: str = "tags",
) -> Iterator[Sentence]:  # fmt: skip
    """Sentences of CoNLL files: a word a line, its columns apart by white space, an empty line after a sentence.

    Lines that begin with -DOCSTART- are left out. Of an `hf:` name the rows are read that have words, whose lists are in its
    columns words_field and tags_field.

    Raises:
        DataError: a line without these columns, or with another number of columns than the sentence began with.
    """
    for path in Corpus(sources).paths:
        if is_named(path):
            yield from _named_sentences(path, words_field, tags_field)
            continue
        words: list[str] = []
        tags: list[str] = []
        begun = width = 0
        found = False
        for number, line in enumerate((*_lines(path), ""), 1):
            row = line.split()
            if row and row[0] == "-DOCSTART-":
                continue
            if row:
                where = f"{path}:{number}"
                if not words:
                    begun, width = number, len(row)
                if len(row) != width:
                    raise DataError(f"{where}: {len(row)} columns where the sentence began with {width}")
                if not all(-width <= column < width for column in (word_column, tag_column)) or width < 2:
                    raise DataError(f"{where}: {width} columns; the word is in column {word_column}, the tag in {tag_column}")
                words.append(row[word_column])
                tags.append(row[tag_column])
            elif words:
                found = True
                yield Sentence(f"{path}:{begun}", words, tags)
                words, tags = [], []
        if not found:
            raise DataError(f"{path} holds no sentences")


def _named_sentences(source: str, words_field: str, tags_field: str) -> Iterator[Sentence]:
    found = False
    for where, row in named_rows(source, [words_field, tags_field]):
        words, tags = row[words_field], row[tags_field]
        for name, values, kinds in ((words_field, words, str), (tags_field, tags, str | int)):
            if not isinstance(values, list) or not all(isinstance(value, kinds) for value in values):
                raise DataError(f"{where}: field {name!r} must be a list of strings, got {values!r:.200}")
        if len(words) != len(tags):
            raise DataError(f"{where}: {len(words)} words and {len(tags)} tags")
        if words:
            found = True
            yield Sentence(where, words, [str(tag) for tag in tags])
    if not found:
        raise DataError(f"{source} holds no sentences")


def read_questions(sources: Sequence[str | os.PathLike[str]]) -> Iterator[Question]:
    """The questions of SQuAD's .json files (v1.1 and v2.0), also with .gz, and of `hf:` names with SQuAD's columns.

    Raises:
        DataError: not such a file, or an answer that is not in its context where the file says.
    """
    for path in Corpus(sources).paths:
        if is_named(path):
            for where, row in named_rows(path, ["question", "context", "answers.text", "answers.answer_start"]):
                answers = list(zip(row["answers.text"], row["answers.answer_start"], strict=True))
                yield _question(where, row["question"], row["context"], answers)
            continue
        if suffix_of(path) != ".json":
            raise DataError(f"{path}: questions are read from .json as SQuAD has it, also with .gz")
        found = False
        try:
            articles = json.loads("".join(_lines(path)))["data"]
            for i, article in enumerate(articles):
                for j, paragraph in enumerate(article["paragraphs"]):
                    context = paragraph["context"]
                    for entry in paragraph["qas"]:
                        where = f"{path}: article {i}, paragraph {j}, question {entry.get('id')!r}"
                        answers = [(answer["text"], answer["answer_start"]) for answer in entry["answers"]]
                        found = True
                        yield _question(where, entry["question"], context, answers)
        except DataError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: not JSON as SQuAD has it: {error!r}") from error
        if not found:
            raise DataError(f"{path} holds no questions")


def _question(where: str, question: str, context: str, answers: list[tuple[str, int]]) -> Question:
    for text, start in answers:
        if not text or context[start : start + len(text)] != text:
            raise DataError(f"{where}: the answer {text!r} is not in the context at {start}")
    return Question(where, question, context, answers)
