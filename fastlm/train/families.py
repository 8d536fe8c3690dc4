"""The families by --model."""

from __future__ import annotations

from .decoder import GPTFamily, LSTMFamily
from .encoder import BERTFamily
from .encoder_decoder import TransformerFamily
from .family import Family
from .t5 import T5Family

__all__ = ["FAMILIES"]

FAMILIES: dict[str, Family] = {
    "gpt": GPTFamily(),
    "lstm": LSTMFamily(),
    "bert": BERTFamily(),
    "transformer": TransformerFamily(),
    "t5": T5Family(),
}
