"""Text to batches: corpora, tokenizers, token files, loaders.

    data = prepare(["my/texts/*.txt"], vocab_size=8192)
    for batch in Loader(data.training, batch_size=8, seq_len=256, seed=0):
        ...

A room below models and engine: it knows of neither.
"""

from __future__ import annotations

from fastlm.data.aligned import TextPairs, read_aligned
from fastlm.data.cache import cache_dir
from fastlm.data.codec import Codec
from fastlm.data.corpus import Corpus, DataError, Piece, read_corpus
from fastlm.data.dataset import Dataset, learn_tokenizer, prepare
from fastlm.data.loader import IGNORED, Loader, ValidationLoader
from fastlm.data.order import Draws
from fastlm.data.packs import Pack, PackLoader, PackValidation, Pairs
from fastlm.data.records import (
    Question,
    Record,
    Sentence,
    read_lines,
    read_questions,
    read_records,
    read_tagged,
)
from fastlm.data.samples import SampleLoader, Samples, SampleValidation
from fastlm.data.tokenizer import Tokenizer
from fastlm.data.tokens import TokenFile, TokenFileError, TokenSplit, open_tokens
from fastlm.data.wordpiece import WordPiece

__all__ = [
    "IGNORED",
    "Codec",
    "Corpus",
    "DataError",
    "Dataset",
    "Draws",
    "Loader",
    "Pack",
    "PackLoader",
    "PackValidation",
    "Pairs",
    "Piece",
    "Question",
    "Record",
    "SampleLoader",
    "SampleValidation",
    "Samples",
    "Sentence",
    "TextPairs",
    "TokenFile",
    "TokenFileError",
    "TokenSplit",
    "Tokenizer",
    "ValidationLoader",
    "WordPiece",
    "cache_dir",
    "learn_tokenizer",
    "open_tokens",
    "prepare",
    "read_aligned",
    "read_corpus",
    "read_lines",
    "read_questions",
    "read_records",
    "read_tagged",
]
