"""Data by name: `hf:` sources, which the `datasets` library reads (the extra [hf]).

    hf:NAME[:SPLIT]

NAME is a folder here, of `save_to_disk` or of files that the library knows (.parquet, .jsonl, ...); or a data set of the
Hub: `name`, `owner/name`, or either of them with `/config` behind. Where `a/b` is no owner's data set, it is config b of a.
SPLIT is the library's, `validation` or `train[:1000]` for instance; train if none is said.

A column within a column is named with a dot: `translation.en`. Labels that the data set has as numbers with names are read
as their names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from fastlm.data.errors import DataError

__all__ = ["is_named", "named_rows"]

_PREFIX = "hf:"


def is_named(source: str) -> bool:
    """Whether a source is one of these, and not a file."""
    return source.startswith(_PREFIX)


def named_rows(source: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, {column: value}) of each row of `hf:...`, in order; the rows are counted from 0.

    Raises:
        DataError: the library is not there, cannot load this, or the data has no such column or no rows.
    """
    data = _loaded(source)
    for name in columns:
        if name not in data.column_names:
            there = ", ".join(map(repr, data.column_names))
            raise DataError(f"{source}: no field {name!r}; the records have {there}")
    if not len(data):
        raise DataError(f"{source} holds no records")
    features = {name: data.features[name] for name in columns}
    for number, row in enumerate(data.select_columns(list(columns))):
        where = f"{source}: row {number}"
        yield where, {name: _with_names(feature, row[name], where) for name, feature in features.items()}


def _with_names(feature: Any, value: Any, where: str) -> Any:
    """The name of a class, or the names of classes, in place of their numbers."""
    if names := getattr(feature, "names", None):
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise DataError(f"{where}: {value!r} is not the number of a class, of which there are {len(names)}")
        return names[value]
    inner = getattr(feature, "feature", None)
    if isinstance(value, list) and getattr(inner, "names", None):
        return [_with_names(inner, item, where) for item in value]
    return value


@lru_cache(maxsize=8)
def _loaded(source: str) -> Any:
    """The library's table, with columns that are not nested."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source}: data by name is read by the `datasets` library: install fastlm with its extra [hf]"
        ) from error
    name, _, split = source.removeprefix(_PREFIX).partition(":")
    path = os.path.expanduser(name)
    if not name:
        raise DataError(f"{source}: a name must follow {_PREFIX}")
    # It raises many kinds of errors for what it cannot load.
    try:
        if any(os.path.exists(os.path.join(path, file)) for file in ("dataset_dict.json", "state.json")):
            data = _split_of(datasets.load_from_disk(path), split, source)
        elif os.path.exists(path):
            data = datasets.load_dataset(path, split=split or "train")
        else:
            data = _from_hub(datasets, name, split or "train")
        return data.flatten()
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"cannot load {source}: {error}") from error


def _split_of(data: Any, split: str, source: str) -> Any:
    """One split of what `save_to_disk` kept: several by name, or a single one, which may have none."""
    splits = data if isinstance(data, dict) else {str(data.split or "train"): data}
    if not split and len(splits) == 1:
        return next(iter(splits.values()))
    if (split or "train") not in splits:
        raise DataError(f"{source}: no split {split or 'train'!r}; there are {', '.join(map(repr, splits))}")
    return splits[split or "train"]


def _from_hub(datasets: Any, name: str, split: str) -> Any:
    """`owner/name` where there is one, else `name/config`."""
    parts = name.split("/")
    if len(parts) > 3 or not all(parts):
        raise ValueError("a name is name, owner/name, name/config or owner/name/config")
    if len(parts) == 3:
        return datasets.load_dataset("/".join(parts[:2]), parts[2], split=split)
    try:
        return datasets.load_dataset(name, split=split)
    except (FileNotFoundError, ConnectionError):  # not there, or not here while there is no network
        if len(parts) == 1:
            raise
        return datasets.load_dataset(*parts, split=split)
