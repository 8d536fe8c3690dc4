"""Optimizers for any PyTorch code: `torch.optim.Optimizer`s whose update is one fused op a parameter.

Parameter groups, learning-rate schedulers, closures and state dicts work as torch's own; state dicts go both ways.
"""

from __future__ import annotations

from .adafactor import Adafactor
from .adamw import AdamW
from .lion import Lion
from .muon import Muon
from .optimizer import FusedOptimizer
from .sgd import SGD

__all__ = ["SGD", "Adafactor", "AdamW", "FusedOptimizer", "Lion", "Muon"]
