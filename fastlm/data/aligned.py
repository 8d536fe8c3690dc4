"""Pairs of texts in: files whose lines belong together one by one, or two fields of JSON Lines, CSV and TSV records."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from fastlm.data.corpus import Corpus, DataError
from fastlm.data.records import read_lines, read_records

__all__ = ["TextPairs", "read_aligned"]

Sources = Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class TextPairs:
    """Texts and what each becomes; `name` says where from. empty: pairs left out because a side holds white space only."""

    name: str
    sources: list[str]
    targets: list[str]
    empty: int


def read_aligned(
    sources: Sources, targets: Sources = (), columns: tuple[str, str] = ("source", "target")
) -> TextPairs:
    """The pairs of some files.

    Args:
        sources: files of a text a line; without `targets`, .jsonl, .csv and .tsv files of records. Each also with .gz.
        targets: as many files, line n of each belonging to line n of the source file in its place.
        columns: of records, the fields of the two texts.

    Raises:
        DataError: a file that cannot be read or is not UTF-8 text, a field that is missing or no string, files of different
            numbers of lines (which are given), or no pair at all.
    """
    name = ", ".join(os.fspath(path) for path in (*sources, *targets))
    found = list(_lines(sources, targets) if targets else _records(sources, columns))
    pairs = [pair for pair in found if pair[0].strip() and pair[1].strip()]
    if not pairs:
        raise DataError(f"{name}: no pair of texts, neither of them empty")
    return TextPairs(name, [pair[0] for pair in pairs], [pair[1] for pair in pairs], len(found) - len(pairs))


def _records(sources: Sources, columns: tuple[str, str]) -> Iterator[tuple[str, str]]:
    for record in read_records(sources, columns):
        yield record.text(columns[0]), record.text(columns[1])


def _lines(sources: Sources, targets: Sources) -> Iterator[tuple[str, str]]:
    paths = Corpus(sources).paths, Corpus(targets).paths
    if len(paths[0]) != len(paths[1]):
        raise DataError(
            f"{len(paths[0])} files of sources ({', '.join(paths[0])}) and {len(paths[1])} of targets "
            f"({', '.join(paths[1])}); each needs the other"
        )
    for source, target in zip(*paths, strict=True):
        counts = [0, 0]
        for pair in zip_longest(read_lines(source), read_lines(target)):
            for side, line in enumerate(pair):
                counts[side] += line is not None
            if counts[0] == counts[1]:
                yield pair
        if counts[0] != counts[1]:
            raise DataError(
                f"{source} has {counts[0]:,} lines and {target} {counts[1]:,}; of aligned files line n of one belongs to "
                "line n of the other"
            )
