"""AdamW as the options describe it."""

from __future__ import annotations

import torch

from fastlm.engine import AdamWConfig

from .config import TrainConfig

__all__ = ["adamw_of"]


def adamw_of(config: TrainConfig) -> AdamWConfig:
    """The engine's optimizer."""
    optimizer = config.optimizer
    return AdamWConfig(
        lr=optimizer.lr,
        betas=(optimizer.beta1, optimizer.beta2),
        weight_decay=optimizer.weight_decay,
        max_norm=optimizer.clip,
        moments=getattr(torch, optimizer.moments),
    )
