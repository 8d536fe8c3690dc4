"""LayerNorm, alone or fused with the residual addition before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops

__all__ = ["LayerNorm"]


class LayerNorm(torch.nn.LayerNorm):
    """Drop-in for ``torch.nn.LayerNorm``: same constructor, initialisation and state dict.

    ``norm(x)`` normalises x over its last dimensions, `normalized_shape`. ``norm(x, residual)`` returns
    (norm(x + residual), x + residual) from one pass over memory. Outputs have x's dtype; parameters have x's or float32.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, tape: Any = None) -> Any:
        shape = x.shape
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if len(self.normalized_shape) > 1:  # over several dimensions: the same over their product
            k = len(self.normalized_shape)
            x, residual = x.flatten(-k), None if residual is None else residual.flatten(-k)
            weight = None if weight is None else weight.flatten()
            bias = None if bias is None else bias.flatten()
        if x.shape[-1:].numel() != torch.Size(self.normalized_shape).numel():
            raise ValueError(
                f"x: got shape {tuple(shape)}; allowed: (..., {', '.join(map(str, self.normalized_shape))})"
            )
        if residual is None:
            return ops.layer_norm(x, weight, bias, self.eps, tape=tape).view(shape)
        y, total = ops.add_layer_norm(x, residual, weight, bias, self.eps, tape=tape)
        return y.view(shape), total.view(shape)

    def backward(self, dy: Tensor, tape: Any) -> Tensor:
        """dx of ``norm(x)``."""
        dx: Tensor = tape.backward("layer_norm", dy, weight=self.weight, bias=self.bias)
        return dx

    def add_backward(self, dy: Tensor, d_sum: Tensor | None, tape: Any) -> Tensor:
        """The gradient of the sum in ``norm(x, residual)``, which is that of x and of residual; d_sum None if unused."""
        d: Tensor = tape.backward("add_layer_norm", dy, d_sum, weight=self.weight, bias=self.bias)
        return d
