"""The plain text of a run, as tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastlm.data import Codec, Dataset, Tokenizer, WordPiece, prepare

from .config import TrainConfig
from .log import say

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["read_tokens"]


def read_tokens(
    config: TrainConfig,
    console: Console,
    tokenizer: Tokenizer | WordPiece | Codec | None = None,
    kind: type[Tokenizer] | type[WordPiece] = Tokenizer,
) -> Dataset:
    """Tokens of the text, from the cache or made now. tokenizer: None for that of the options, of this kind."""
    options = config.data
    with console.status("reading the text") as status:

        def progress(stage: str, done: int, total: int) -> None:
            share = f", {100 * done // total}%" if total else ""
            status.update(f"{stage}: {done / 1e6:.1f} MB{share}")

        dataset = prepare(
            options.data or None,
            field=options.text_column,
            tokenizer=options.tokenizer if tokenizer is None else tokenizer,
            kind=kind,
            vocab_size=options.vocab_size,
            validation_fraction=options.validation_fraction,
            progress=progress,
        )
    learned, held_out = len(dataset.training.tokens), len(dataset.validation.tokens)
    sizes = f"{learned:,} tokens to learn, {held_out:,} held out"
    say(console, f"text: {dataset.source}; {sizes}, vocabulary {dataset.tokenizer.vocab_size:,}")
    return dataset
