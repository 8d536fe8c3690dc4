"""LayerNorm and RMSNorm, alone or fused with what stands before them: bias, dropout and the residual addition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.rms_norm import check_scale, rms_norm
from .dropout import draw_seed

__all__ = ["LayerNorm", "RMSNorm"]


class _Norm(torch.nn.Module):
    """What both have in common: several normalised dimensions count as one, of their product."""

    normalized_shape: tuple[int, ...]

    def _norm(self, x: Tensor, parameters: dict[str, Tensor | None], tape: Any) -> Tensor:
        raise NotImplementedError

    def _add_norm(
        self, x: Tensor, residual: Tensor, parameters: dict[str, Tensor | None], more: dict[str, Any], tape: Any
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(
        self, x: Tensor, residual: Tensor | None = None, tape: Any = None, *, x_bias: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> Any:  # fmt: skip
        shape, width = x.shape, tuple(self.normalized_shape)
        if tuple(shape[-len(width) :]) != width:
            raise ValueError(f"x: got shape {tuple(shape)}; allowed: (..., {', '.join(map(str, width))})")
        parameters: dict[str, Tensor | None] = dict(self._parameters)
        if len(width) > 1:
            parameters = {n: p if p is None else p.flatten() for n, p in parameters.items()}
            x, residual = x.flatten(-len(width)), None if residual is None else residual.flatten(-len(width))
            x_bias = None if x_bias is None else x_bias.flatten()
        if residual is None:
            if x_bias is not None or dropout_p:
                raise ValueError("residual: got None; x_bias and dropout_p need one")
            return self._norm(x, parameters, tape).view(shape)
        p = dropout_p if self.training else 0.0
        more = {"x_bias": x_bias, "dropout_p": p, "seed": draw_seed(x.device, tape) if p > 0 else None}
        y, total = self._add_norm(x, residual, parameters, more, tape)
        return y.view(shape), total.view(shape)

    def _backward(self, name: str, upstream: Sequence[Tensor | None], tape: Any, x_bias: Tensor | None = None) -> Any:
        width = len(self.normalized_shape)
        given = {**self._parameters, "x_bias": x_bias} if name.startswith("add") else dict(self._parameters)
        if width == 1:
            return tape.backward(name, *upstream, **given)
        buffers = {n: tape.gradient(p) for n, p in given.items()}
        flat = {n: buffer.view(-1) for n, buffer in buffers.items() if buffer is not None}
        shape = next(d.shape for d in upstream if d is not None)
        rows = [None if d is None else d.flatten(-width) for d in upstream]
        out = tape.backward(name, *rows, into=flat, **given)
        return tuple(d.view(shape) for d in out) if isinstance(out, tuple) else out.view(shape)


class LayerNorm(_Norm, torch.nn.LayerNorm):
    """Drop-in for ``torch.nn.LayerNorm``: same constructor, initialisation and state dict.

    ``norm(x)`` normalises x over its last dimensions, `normalized_shape`. ``norm(x, residual)`` returns
    (norm(x + residual), x + residual) from one pass over memory, and with the keywords x_bias (of `normalized_shape`) and
    dropout_p the same of dropout(x + x_bias) + residual; in evaluation nothing is dropped. Outputs have x's dtype;
    parameters have x's or float32.
    """

    def _norm(self, x: Tensor, parameters: dict[str, Tensor | None], tape: Any) -> Tensor:
        y: Tensor = ops.layer_norm(x, parameters["weight"], parameters["bias"], self.eps, tape=tape)
        return y

    def _add_norm(
        self, x: Tensor, residual: Tensor, parameters: dict[str, Tensor | None], more: dict[str, Any], tape: Any
    ) -> tuple[Tensor, Tensor]:
        weight, bias = parameters["weight"], parameters["bias"]
        y, total = ops.add_layer_norm(x, residual, weight, bias, self.eps, **more, tape=tape)
        return y, total

    def backward(self, dy: Tensor, tape: Any) -> Tensor:
        """dx of ``norm(x)``."""
        dx: Tensor = self._backward("layer_norm", (dy,), tape)
        return dx

    def add_backward(self, dy: Tensor, d_sum: Tensor | None, tape: Any, x_bias: Tensor | None = None) -> Any:
        """The gradient of the sum in ``norm(x, residual)``, which is that of x and of residual; d_sum None if unused.

        After dropout the two differ: (d x, d residual). x_bias: as in forward; its gradient is added to its buffer.
        """
        return self._backward("add_layer_norm", (dy, d_sum), tape, x_bias)


class RMSNorm(_Norm, torch.nn.RMSNorm):
    """Drop-in for ``torch.nn.RMSNorm``: same constructor, initialisation and state dict, and two keywords more.

    offset: added to the weight, which begins at 1 - offset; 1.0 for Gemma.
    casting: "gemma" (also torch's) rounds once; "llama" rounds the normalised x before the weight (see ops.rms_norm).

    ``norm(x)`` and ``norm(x, residual, x_bias=..., dropout_p=...)`` as LayerNorm's. eps None is, as torch's,
    the machine epsilon of the dtype of the statistics: float32, or float64 for a float64 x.
    """

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float | None = None, elementwise_affine: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, offset: float = 0.0,
        casting: str = "gemma",
    ) -> None:  # fmt: skip
        check_scale(torch.empty(0) if elementwise_affine else None, offset, casting)
        self.offset, self.casting = offset, casting  # before the weight is initialised
        shape = normalized_shape if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 1.0 - self.offset)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, offset={self.offset}, casting={self.casting!r}"

    def _eps(self, x: Tensor) -> float:
        if self.eps is not None:
            return self.eps
        return torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps

    def _norm(self, x: Tensor, parameters: dict[str, Tensor | None], tape: Any) -> Tensor:
        options: dict[str, Any] = {"offset": self.offset, "casting": self.casting}
        y: Tensor = rms_norm(x, parameters["weight"], self._eps(x), **options, tape=tape)
        return y

    def _add_norm(
        self, x: Tensor, residual: Tensor, parameters: dict[str, Tensor | None], more: dict[str, Any], tape: Any
    ) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"offset": self.offset, "casting": self.casting, **more}
        y, total = ops.add_rms_norm(x, residual, parameters["weight"], self._eps(x), **options, tape=tape)
        return y, total

    def backward(self, dy: Tensor, tape: Any) -> Tensor:
        """dx of ``norm(x)``."""
        dx: Tensor = self._backward("rms_norm", (dy,), tape)
        return dx

    def add_backward(self, dy: Tensor, d_sum: Tensor | None, tape: Any, x_bias: Tensor | None = None) -> Any:
        """As LayerNorm's."""
        return self._backward("add_rms_norm", (dy, d_sum), tape, x_bias)
