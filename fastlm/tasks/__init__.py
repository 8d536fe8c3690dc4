"""Objectives: what a batch is, and what its loss means."""

from __future__ import annotations

from fastlm.tasks.causal_lm import CausalLM, Evaluation, Metrics, unigram_entropy

__all__ = ["CausalLM", "Evaluation", "Metrics", "unigram_entropy"]
