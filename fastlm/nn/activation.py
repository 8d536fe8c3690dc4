"""Activations and gated units as layers: drop-ins for torch's, and the gates that torch has not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .dropout import draw_seed

__all__ = ["GEGLU", "GELU", "ReGLU", "ReLU", "SiLU", "SwiGLU"]


class GELU(torch.nn.GELU):
    """Drop-in for ``torch.nn.GELU``. approximate: "none" or "tanh"."""

    def forward(self, x: Tensor, tape: Any = None) -> Tensor:
        return ops.gelu(x, None, self.approximate, tape=tape)

    def backward(self, dy: Tensor, tape: Any) -> Tensor:
        """dx."""
        dx: Tensor = tape.backward("gelu", dy)
        return dx


def _not_in_place(inplace: bool) -> None:
    if inplace:
        raise ValueError("inplace: got True; allowed: False, as no op of ours changes its input")


class SiLU(torch.nn.SiLU):
    """Drop-in for ``torch.nn.SiLU``, not in place."""

    def __init__(self, inplace: bool = False) -> None:
        _not_in_place(inplace)
        super().__init__()

    def forward(self, x: Tensor, tape: Any = None) -> Tensor:
        return ops.silu(x, tape=tape)

    def backward(self, dy: Tensor, tape: Any) -> Tensor:
        """dx."""
        dx: Tensor = tape.backward("silu", dy)
        return dx


class ReLU(torch.nn.ReLU):
    """Drop-in for ``torch.nn.ReLU``, not in place."""

    def __init__(self, inplace: bool = False) -> None:
        _not_in_place(inplace)
        super().__init__()

    def forward(self, x: Tensor, tape: Any = None) -> Tensor:
        return ops.relu(x, tape=tape)

    def backward(self, dy: Tensor, tape: Any) -> Tensor:
        """dx."""
        dx: Tensor = tape.backward("relu", dy)
        return dx


class _Gated(torch.nn.Module):
    """dropout(act(gate) * up): of one packed tensor (..., 2 N), [gate | up], or of two (..., N).

    up_first: packed as [up | gate], the order of ``torch.nn.GLU``. dropout: in training.
    """

    op: str

    def __init__(self, up_first: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: got {dropout}; allowed: 0 to 1")
        self.up_first, self.dropout = up_first, dropout

    def extra_repr(self) -> str:
        return f"up_first={self.up_first}, dropout={self.dropout}"

    def forward(self, gate: Tensor, up: Tensor | None = None, tape: Any = None) -> Tensor:
        p = self.dropout if self.training else 0.0
        seed = draw_seed(gate.device, tape) if p > 0 else None
        y: Tensor = getattr(ops, self.op)(
            gate, up, up_first=self.up_first, dropout_p=p, seed=seed, tape=tape, **self._form()
        )
        return y

    def _form(self) -> dict[str, Any]:
        return {}

    def backward(self, dy: Tensor, tape: Any) -> Any:
        """The packed gradient, or (d_gate, d_up)."""
        return tape.backward(self.op, dy)


class SwiGLU(_Gated):
    __doc__ = f"With SiLU: {_Gated.__doc__}"
    op = "swiglu"


class GEGLU(_Gated):
    __doc__ = f"With GELU, in the form that `approximate` names: {_Gated.__doc__}"
    op = "geglu"

    def __init__(self, up_first: bool = False, dropout: float = 0.0, approximate: str = "none") -> None:
        super().__init__(up_first, dropout)
        self.approximate = approximate

    def _form(self) -> dict[str, Any]:
        return {"approximate": self.approximate}


class ReGLU(_Gated):
    __doc__ = f"With ReLU: {_Gated.__doc__}"
    op = "reglu"
