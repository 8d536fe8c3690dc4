"""Adafactor with `fastlm.ops.adafactor` for its update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .optimizer import FusedOptimizer

__all__ = ["Adafactor"]


class Adafactor(FusedOptimizer):
    """`torch.optim.Adafactor` (without maximize) with clipping and stochastic rounding in its pass.

    params: of up to two dimensions (torch's factors the last two of more). lr, beta2_decay, eps, d, weight_decay: as
    torch's. max_norm, clip_each, seed: see `FusedOptimizer`. The moments are float32 for half-precision parameters.
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-2, beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3), d: float = 1.0, weight_decay: float = 0.0, *,
        max_norm: float = 0.0, clip_each: bool = False, seed: int | None = None,
    ) -> None:  # fmt: skip
        if not beta2_decay <= 0:
            raise ValueError(f"Adafactor: beta2_decay: got {beta2_decay}; allowed: <= 0")
        if not d >= 1:
            raise ValueError(f"Adafactor: d: got {d}; allowed: >= 1")
        if len(eps) != 2 or not all(e is None or e >= 0 for e in eps[:1]) or not eps[1] >= 0:
            raise ValueError(f"Adafactor: eps: got {eps}; allowed: two numbers >= 0, the first may be None")
        defaults = {
            "lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay,
            "maximize": False,  # torch's takes it from a state that it loads
        }  # fmt: skip
        super().__init__(params, defaults, max_norm, clip_each, seed, None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take more parameters. ValueError: one has more than two dimensions."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dim() > 2:
                self.param_groups.pop()
                raise ValueError(f"Adafactor: params: got shape {tuple(parameter.shape)}; allowed: up to two dimensions")

    def _states(self, group: dict[str, Any], parameter: Tensor) -> tuple[str, ...]:
        return ("row_var", "col_var") if parameter.dim() == 2 else ("variance",)

    def _fresh(self, name: str, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        if name == "variance":
            return super()._fresh(name, parameter, dtype)
        rows, columns = parameter.shape
        return torch.zeros((rows, 1) if name == "row_var" else (1, columns), dtype=dtype, device=parameter.device)

    def _update(self, group: dict[str, Any], shape: torch.Size, shared: dict[str, Any], **tensors: Tensor) -> None:
        states = {name: tensors.get(name) for name in ("row_var", "col_var", "variance")}
        size = shape if len(shape) == 2 else (-1,)
        options = {name: group[name] for name in ("beta2_decay", "eps", "d")}
        ops.adafactor(
            tensors["master"].view(size), tensors["grad"].view(size), **states, step=tensors["step"], **shared, **options
        )
