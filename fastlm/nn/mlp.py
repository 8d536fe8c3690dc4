"""The feed-forward block: projection, GELU, projection, dropout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .dropout import Dropout
from .linear import Linear

__all__ = ["MLP"]


class _BiasGelu(Linear):
    """Linear whose bias is added by the activation's kernel instead of the GEMM's."""

    def forward(self, x: Tensor, tape: Any = None) -> Tensor:
        if tape is None:
            return F.linear(x, self.weight)
        y: Tensor = tape.linear(x, self.weight, None)
        return y

    def backward(self, dy: Tensor, tape: Any) -> Tensor:
        dx: Tensor = tape.linear_backward(dy, self.weight, None)
        return dx


class MLP(torch.nn.Module):
    """y = dropout(gelu(x W1^T + b1) W2^T + b2), x and y (..., n_embd).

    approximate: GELU by "tanh" (GPT-2's) or "none" (erf). State dict: c_fc, c_proj as torch.nn.Linear's.
    """

    def __init__(
        self, n_embd: int, n_inner: int, bias: bool = True, approximate: str = "tanh", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.approximate = approximate
        self.c_fc = _BiasGelu(n_embd, n_inner, bias=bias)
        self.c_proj = Linear(n_inner, n_embd, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, tape: Any = None) -> Tensor:
        h = self.c_fc(x, tape=tape)
        h = ops.gelu(h, self.c_fc.bias, approximate=self.approximate, tape=tape)
        y = self.c_proj(h, tape=tape)
        return self.dropout(y, tape=tape)

    def backward(self, dy: Tensor, tape: Any) -> Tensor:
        """dx, the mirror of forward."""
        dy = self.dropout.backward(dy, tape)
        dh = self.c_proj.backward(dy, tape)
        dh = tape.backward("gelu", dh, bias=self.c_fc.bias)
        return self.c_fc.backward(dh, tape)
