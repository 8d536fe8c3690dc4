"""The feed-forward block: projection, activation or gated unit, projection, dropout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .dropout import Dropout, draw_seed
from .linear import Linear

__all__ = ["MLP"]

_PLAIN = ("gelu", "silu", "relu", "relu_squared")
_GATED = ("geglu", "swiglu", "reglu")


class _BiasLater(Linear):
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
    """y = dropout(inner_dropout(act(x W1^T + b1)) W2^T + b2), x and y (..., n_embd).

    Args:
        n_inner: width of the activation.
        approximate: of GELU, "tanh" (GPT-2's) or "none" (erf).
        dropout: of the result; inner_dropout: of the activation, fused into it (T5 has it). Both in training only.
        activation: the op: "gelu", "silu", "relu", "relu_squared"; or gated "geglu", "swiglu" (Llama's), "reglu", for
            which W1 is (2 n_inner, n_embd), the gate's rows first.

    With ``recompute = True`` a tape keeps x alone, and backward computes the activation again.

    State dict: c_fc, c_proj as torch.nn.Linear's.
    """

    recompute = False

    def __init__(
        self, n_embd: int, n_inner: int, bias: bool = True, approximate: str = "tanh", dropout: float = 0.0,
        activation: str = "gelu", inner_dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if activation not in (*_PLAIN, *_GATED):
            raise ValueError(f"activation: got {activation!r}; allowed: {', '.join((*_PLAIN, *_GATED))}")
        if not 0 <= inner_dropout <= 1:
            raise ValueError(f"inner_dropout: got {inner_dropout}; allowed: 0 to 1")
        self.activation, self.inner_dropout = activation, inner_dropout
        self._form = {"approximate": approximate} if activation in ("gelu", "geglu") else {}
        self._bias = "gate_bias" if activation in _GATED else "bias"
        self.c_fc = _BiasLater(n_embd, (2 if activation in _GATED else 1) * n_inner, bias=bias)
        self.c_proj = Linear(n_inner, n_embd, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, tape: Any = None) -> Tensor:
        y = tape.checkpoint(self._project, x) if self.recompute and tape is not None else self._project(x, tape=tape)
        return self.dropout(y, tape=tape)

    def backward(self, dy: Tensor, tape: Any) -> Tensor:
        """dx, the mirror of forward."""
        dy = self.dropout.backward(dy, tape)
        if self.recompute:
            dx: Tensor = tape.checkpoint_backward(self._project_backward, dy)
            return dx
        return self._project_backward(dy, tape=tape)

    def _project(self, x: Tensor, tape: Any) -> Tensor:
        h = self.c_fc(x, tape=tape)
        p = self.inner_dropout if self.training else 0.0
        seed = draw_seed(x.device, tape) if p > 0 else None
        act = getattr(ops, self.activation)
        h = act(h, **{self._bias: self.c_fc.bias}, **self._form, dropout_p=p, seed=seed, tape=tape)
        y: Tensor = self.c_proj(h, tape=tape)
        return y

    def _project_backward(self, dy: Tensor, tape: Any) -> Tensor:
        dh = self.c_proj.backward(dy, tape)
        dh = tape.backward(self.activation, dh, **{self._bias: self.c_fc.bias})
        return self.c_fc.backward(dh, tape)
