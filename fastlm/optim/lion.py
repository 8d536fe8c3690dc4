"""Lion with `fastlm.ops.lion` for its update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .optimizer import FusedOptimizer

__all__ = ["Lion"]


class Lion(FusedOptimizer):
    """Lion (Chen et al. 2023) with clipping and stochastic rounding in its pass; torch has none.

    params, lr (3 to 10 times smaller than AdamW's), betas, weight_decay (as much larger): as the paper's. max_norm,
    clip_each, seed, state_dtype: see `FusedOptimizer`.
    """

    STATES = ("exp_avg",)

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0, *, max_norm: float = 0.0, clip_each: bool = False, seed: int | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults, max_norm, clip_each, seed, state_dtype)

    def _update(self, group: dict[str, Any], shape: torch.Size, shared: dict[str, Any], **tensors: Tensor) -> None:
        ops.lion(**tensors, **shared, betas=group["betas"])
