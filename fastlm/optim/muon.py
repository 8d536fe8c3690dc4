"""Muon with `fastlm.ops.muon` for its update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .optimizer import FusedOptimizer

__all__ = ["Muon"]


class Muon(FusedOptimizer):
    """`torch.optim.Muon` with clipping and stochastic rounding in its pass; matrices only, as there.

    params: two-dimensional; biases, norms, embeddings and heads go to `AdamW`. lr, weight_decay, momentum, nesterov,
    ns_coefficients, eps, ns_steps, adjust_lr_fn: as torch's. max_norm, clip_each, seed, state_dtype: see
    `FusedOptimizer`. Its state holds a count of steps beside torch's momentum buffer; torch ignores it.
    """

    STATES = ("momentum_buffer",)

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95,
        nesterov: bool = True, ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7, ns_steps: int = 5, adjust_lr_fn: str | None = None, *, max_norm: float = 0.0,
        clip_each: bool = False, seed: int | None = None, state_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn,
        }  # fmt: skip
        super().__init__(params, defaults, max_norm, clip_each, seed, state_dtype)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take more matrices. ValueError: a parameter is none."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dim() != 2:
                self.param_groups.pop()
                raise ValueError(f"Muon: params: got shape {tuple(parameter.shape)}; allowed: matrices, others to AdamW")

    def _update(self, group: dict[str, Any], shape: torch.Size, shared: dict[str, Any], **tensors: Tensor) -> None:
        names = ("momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
        options = {name: group[name] for name in names}
        ops.muon(**tensors, **shared, **options, shapes=[(shape[0], shape[1])])
