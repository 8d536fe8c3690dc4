"""Text to batches: corpora, tokenizers, token files, loaders.

    data = prepare(["my/texts/*.txt"], vocab_size=8192)
    for batch in Loader(data.training, batch_size=8, seq_len=256, seed=0):
        ...

A room below models and engine: it knows of neither.
"""

from __future__ import annotations

from fastlm.data.cache import cache_dir
from fastlm.data.corpus import Corpus, DataError, Piece, read_corpus
from fastlm.data.dataset import Dataset, prepare
from fastlm.data.loader import IGNORED, Loader, ValidationLoader
from fastlm.data.tokenizer import Tokenizer
from fastlm.data.tokens import TokenFile, TokenFileError, TokenSplit, open_tokens

__all__ = [
    "IGNORED",
    "Corpus",
    "DataError",
    "Dataset",
    "Loader",
    "Piece",
    "TokenFile",
    "TokenFileError",
    "TokenSplit",
    "Tokenizer",
    "ValidationLoader",
    "cache_dir",
    "open_tokens",
    "prepare",
    "read_corpus",
]
