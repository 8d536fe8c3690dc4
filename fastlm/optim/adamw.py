"""AdamW with `fastlm.ops.adamw` for its update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .optimizer import FusedOptimizer

__all__ = ["AdamW"]


class AdamW(FusedOptimizer):
    """`torch.optim.AdamW` (without amsgrad and maximize) with clipping and stochastic rounding in its pass.

    params, lr, betas, eps, weight_decay: as torch's. max_norm, clip_each, seed, state_dtype: see `FusedOptimizer`.
    """

    STATES = ("exp_avg", "exp_avg_sq")

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, max_norm: float = 0.0, clip_each: bool = False, seed: int | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, max_norm, clip_each, seed, state_dtype)

    def _update(self, group: dict[str, Any], shape: torch.Size, shared: dict[str, Any], **tensors: Tensor) -> None:
        ops.adamw(**tensors, **shared, betas=group["betas"], eps=group["eps"])
