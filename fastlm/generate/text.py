"""Text of tokens as they come."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlm.data.tokenizer import Tokenizer

__all__ = ["stream_text"]


def stream_text(tokenizer: Tokenizer | Any, ids: Iterable[int]) -> Iterator[str]:
    """Text of ids as they come, never with half a character: its bytes may be spread over several tokens.

    Bytes that can no longer become a character appear as U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        # surrogateescape carries any bytes through str unharmed
        data = tokenizer.decode([token], errors="surrogateescape").encode(errors="surrogateescape")
        if text := decoder.decode(data):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest
