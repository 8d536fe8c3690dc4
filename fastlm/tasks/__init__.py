"""Objectives: what a batch is, and what its loss means. ``task.py`` says what a task has."""

from __future__ import annotations

from fastlm.tasks.causal_lm import CausalLM, Evaluation, Metrics, unigram_entropy
from fastlm.tasks.classification import Classification
from fastlm.tasks.masked_lm import MaskedLM, MaskedText
from fastlm.tasks.span_qa import SpanQA
from fastlm.tasks.tagging import Tagging
from fastlm.tasks.task import EncoderTask, Examples, MeanLoss, Scores

__all__ = [
    "CausalLM",
    "Classification",
    "EncoderTask",
    "Evaluation",
    "Examples",
    "MaskedLM",
    "MaskedText",
    "MeanLoss",
    "Metrics",
    "Scores",
    "SpanQA",
    "Tagging",
    "unigram_entropy",
]
