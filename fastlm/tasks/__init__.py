"""Objectives: what a batch is, and what its loss means. ``task.py`` says what a task has."""

from __future__ import annotations

from fastlm.tasks.causal_lm import CausalLM, Evaluation, Metrics, unigram_entropy
from fastlm.tasks.classification import Classification
from fastlm.tasks.masked_lm import MaskedLM, MaskedText
from fastlm.tasks.sequence_to_sequence import SequencePairs, SequenceToSequence
from fastlm.tasks.span_corruption import SpanCorruption, SpanText, with_sentinels
from fastlm.tasks.span_qa import SpanQA
from fastlm.tasks.tagging import Tagging
from fastlm.tasks.task import EncoderTask, Evaluator, Examples, MeanLoss, Result, Scores, Task

__all__ = [
    "CausalLM",
    "Classification",
    "EncoderTask",
    "Evaluation",
    "Evaluator",
    "Examples",
    "MaskedLM",
    "MaskedText",
    "MeanLoss",
    "Metrics",
    "Result",
    "Scores",
    "SequencePairs",
    "SequenceToSequence",
    "SpanCorruption",
    "SpanQA",
    "SpanText",
    "Tagging",
    "Task",
    "unigram_entropy",
    "with_sentinels",
]
