"""Linear: y = x W^T + b. The product is the GEMM library's, in the engine as engine/gemm.py says; its gradients are by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Linear"]


class Linear(torch.nn.Linear):
    """Drop-in for ``torch.nn.Linear``: same constructor, initialisation and state dict.

    Shapes: x (..., in_features) -> (..., out_features), in x's dtype; weight (out_features, in_features).
    """

    def forward(self, x: Tensor, tape: Any = None) -> Tensor:
        if tape is None:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = tape.linear(x, self.weight, self.bias)
        return y

    def backward(self, dy: Tensor, tape: Any) -> Tensor:
        """dx = dy W; W's gradient += dy^T x; b's += sum of dy over rows."""
        dx: Tensor = tape.linear_backward(dy, self.weight, self.bias)
        return dx
