"""What tokenizers of the `tokenizers` library have in common: how they are found, and how they are kept."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fastlm.data.cache import written_whole

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

__all__ = ["LibraryTokenizer", "library"]


def library() -> Any:
    """The package, imported when it is first needed."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "text is tokenized by the `tokenizers` library: install fastlm with its extra [train]"
        ) from error
    return tokenizers


class LibraryTokenizer:
    """A tokenizer of the library, `_backend`, and its file."""

    _backend: Backend
    separator_id: int
    """Ends a document."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        raise NotImplementedError

    def special_id(self, token: str) -> int | None:
        """The id of a special token, None if there is no such one."""
        identifier = self._backend.token_to_id(token)
        added = self._backend.get_added_tokens_decoder()
        return identifier if identifier in added and added[identifier].special else None

    @cached_property
    def sentinels(self) -> tuple[int, ...]:
        """The ids of T5's special tokens <extra_id_0>, <extra_id_1>, ..., as many as there are."""
        found: list[int] = []
        while (identifier := self.special_id(f"<extra_id_{len(found)}>")) is not None:
            found.append(identifier)
        return tuple(found)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `tokenizer.json` that `load`, and any user of the `tokenizers` library, can read.

        In a folder also what `files` says beside it.
        """
        path = Path(path)
        found = {path / name: text for name, text in self.files().items()} if path.is_dir() else {path: self.to_json()}
        for name, text in found.items():
            with written_whole(name) as file:
                file.write(text.encode())

    def files(self) -> dict[str, str]:
        """What a model's folder needs of it, by file name."""
        return {"tokenizer.json": self.to_json()}

    def to_json(self) -> str:
        """What `save` writes."""
        return self._backend.to_str()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`."""
        return cls(library().Tokenizer.from_str(text))
