"""What tokenizers of the `tokenizers` library have in common: how they are found, and how they are kept."""

from __future__ import annotations

import os
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

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `tokenizer.json` that `load`, and any user of the `tokenizers` library, can read."""
        path = Path(path)
        with written_whole(path / "tokenizer.json" if path.is_dir() else path) as file:
            file.write(self.to_json().encode())

    def to_json(self) -> str:
        """What `save` writes."""
        return self._backend.to_str()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`."""
        return cls(library().Tokenizer.from_str(text))
