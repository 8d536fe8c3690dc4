"""Models: a config, a module with forward and hand-written backward, and Hugging Face directories in and out."""

from __future__ import annotations

from .gpt import GPT, GPTConfig
from .lstm import LSTM, LSTMConfig, LSTMEncoder

__all__ = ["GPT", "GPTConfig", "LSTM", "LSTMConfig", "LSTMEncoder"]
