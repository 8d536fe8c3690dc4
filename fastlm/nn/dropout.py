"""Dropout whose mask is a function of a seed, so that backward stores nothing and every backend draws the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops

__all__ = ["Dropout", "draw_seed"]


def draw_seed(device: torch.device, tape: Any = None) -> Tensor:
    """An int64 tensor of one element: the tape's next, else drawn from torch's generator of the device."""
    if tape is not None:
        seed: Tensor = tape.seed()
        return seed
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


class Dropout(torch.nn.Module):
    """Drop-in for ``torch.nn.Dropout`` (not in place). In evaluation, or with p = 0, it is the identity."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p: got {p}; allowed: 0 to 1")
        self.p = p

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def forward(self, x: Tensor, tape: Any = None) -> Tensor:
        if not self.training or self.p == 0:
            return x
        y: Tensor = ops.dropout(x, self.p, seed=draw_seed(x.device, tape), tape=tape)
        return y

    def backward(self, dy: Tensor, tape: Any) -> Tensor:
        """dx: dy under the same mask and scale."""
        if not self.training or self.p == 0:
            return dy
        dx: Tensor = tape.backward("dropout", dy)
        return dx
