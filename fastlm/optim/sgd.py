"""SGD with `fastlm.ops.sgd` for its update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .optimizer import FusedOptimizer

__all__ = ["SGD"]


class SGD(FusedOptimizer):
    """`torch.optim.SGD` (without maximize) with clipping and stochastic rounding in its pass.

    params, lr, momentum, dampening, weight_decay, nesterov: as torch's. max_norm, clip_each, seed, state_dtype: see
    `FusedOptimizer`. Its state holds a count of steps beside torch's momentum buffer; torch ignores it.
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
        weight_decay: float = 0.0, nesterov: bool = False, *, max_norm: float = 0.0, clip_each: bool = False,
        seed: int | None = None, state_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(f"SGD: nesterov: got momentum {momentum}, dampening {dampening}; allowed: > 0 and 0")
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
        }  # fmt: skip
        super().__init__(params, defaults, max_norm, clip_each, seed, state_dtype)

    def _states(self, group: dict[str, Any], parameter: Tensor) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _update(self, group: dict[str, Any], shape: torch.Size, shared: dict[str, Any], **tensors: Tensor) -> None:
        options = {name: group[name] for name in ("momentum", "dampening", "nesterov")}
        ops.sgd(**{"momentum_buffer": None} | tensors, **shared, **options)

    def _complete(self, state: dict[str, Any]) -> None:
        buffer = state.get("momentum_buffer")
        if buffer is None:
            state.pop("momentum_buffer", None)
        elif "step" not in state:  # not the first one: torch has made the buffer
            state["step"] = torch.ones((), dtype=torch.float32, device=buffer.device)
