"""Models: a config, a module with forward and hand-written backward, and Hugging Face directories in and out."""

from __future__ import annotations

from pathlib import Path

from . import checkpoint
from .bert import BERTConfig
from .bert_heads import (
    BERT,
    BERTForMaskedLM,
    BERTForPreTraining,
    BERTForQuestionAnswering,
    BERTForSentenceEmbedding,
    BERTForSequenceClassification,
    BERTForTokenClassification,
)
from .encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from .gpt import GPT, GPTConfig
from .lstm import LSTM, LSTMConfig, LSTMEncoder

__all__ = [
    "BERT",
    "BERTConfig",
    "BERTForMaskedLM",
    "BERTForPreTraining",
    "BERTForQuestionAnswering",
    "BERTForSentenceEmbedding",
    "BERTForSequenceClassification",
    "BERTForTokenClassification",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "GPT",
    "GPTConfig",
    "LSTM",
    "LSTMConfig",
    "LSTMEncoder",
    "load",
]


def load(directory: str | Path) -> EncoderDecoder | GPT | LSTM:
    """The model of a directory, by the model_type of its config.json; errors as of its ``from_pretrained``."""
    kind = checkpoint.read_json(directory).get("model_type")
    if kind in EncoderDecoder.model_types:
        return EncoderDecoder.from_pretrained(directory)
    return LSTM.from_pretrained(directory) if kind == LSTM.model_type else GPT.from_pretrained(directory)
