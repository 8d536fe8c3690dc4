"""Embedding: rows of a table by index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops

__all__ = ["Embedding"]


class Embedding(torch.nn.Embedding):
    """Drop-in for ``torch.nn.Embedding``: same constructor, initialisation, state dict and ``from_pretrained``.

    The gradient of row padding_idx is 0. Refused: max_norm, with which torch.nn.Embedding writes to its weight in
    forward; sparse, whose gradients no fused optimizer takes; scale_grad_by_freq.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)
        if self.max_norm is not None:
            raise ValueError(
                f"max_norm: got {self.max_norm}; allowed: None, since it would change the weight in forward; "
                "normalise the weight after the optimizer's step instead"
            )
        for name in ("scale_grad_by_freq", "sparse"):
            if getattr(self, name):
                raise ValueError(f"{name}: got True; allowed: False")

    def forward(self, input: Tensor, tape: Any = None) -> Tensor:
        """input (...), int64 or int32 -> (..., embedding_dim)."""
        y: Tensor = ops.embedding(input, self.weight, padding_idx=self.padding_idx, tape=tape)
        return y

    def backward(self, dy: Tensor, tape: Any) -> None:
        """Adds to the weight's gradient; indices have none."""
        tape.backward("embedding", dy, weight=self.weight)
