"""Causal self-attention with one projection for queries, keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .dropout import Dropout, draw_seed
from .linear import Linear

__all__ = ["CausalSelfAttention"]


class CausalSelfAttention(torch.nn.Module):
    """GPT-2's attention: x (batch, seq, n_embd) -> the same shape; head h reads columns h*head_dim ... of q, k and v.

    attn_dropout acts on the attention weights, dropout on the output. State dict: c_attn (3*n_embd, n_embd), c_proj.
    """

    def __init__(
        self, n_embd: int, n_head: int, bias: bool = True, attn_dropout: float = 0.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if n_head < 1 or n_embd % n_head:
            raise ValueError(f"n_head: got {n_head}; allowed: a divisor of n_embd = {n_embd}")
        self.n_head, self.attn_dropout = n_head, attn_dropout
        self.c_attn = Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = Linear(n_embd, n_embd, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, tape: Any = None) -> Tensor:
        batch, seq, width = x.shape
        p = self.attn_dropout if self.training else 0.0
        qkv = self.c_attn(x, tape=tape)
        q, k, v = _heads(qkv, self.n_head)  # each (batch, heads, seq, head_dim), views
        seed = draw_seed(x.device, tape) if p > 0 else None
        y = ops.attention(q, k, v, causal=True, dropout_p=p, dropout_seed=seed, tape=tape)
        y = self.c_proj(y.transpose(1, 2).reshape(batch, seq, width), tape=tape)
        return self.dropout(y, tape=tape)

    def backward(self, dy: Tensor, tape: Any) -> Tensor:
        """dx, the mirror of forward; the three gradients are written straight into one buffer for c_attn."""
        batch, seq, width = dy.shape
        dy = self.dropout.backward(dy, tape)
        dy = self.c_proj.backward(dy, tape)
        dqkv = tape.empty((batch, seq, 3 * width), dy.dtype)
        dq, dk, dv = _heads(dqkv, self.n_head)
        dy = dy.view(batch, seq, self.n_head, -1).transpose(1, 2)
        tape.backward("attention", dy, None, into={"q": dq, "k": dk, "v": dv})
        return self.c_attn.backward(dqkv, tape)


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(batch, seq, 3 * width) as q, k and v, each (batch, heads, seq, head_dim)."""
    batch, seq, width3 = qkv.shape
    return qkv.view(batch, seq, 3, heads, width3 // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
