"""The activations, their derivatives, and the gated units made of them, in plain PyTorch: one body for eight ops.

    y = dropout(act(gate + gate_bias) * (up + up_bias))        without `up`, the second factor is 1

A form is the name of an activation. Each is one function and one derivative of u = gate + gate_bias, in float32
(float64 for float64):

    gelu_none      u * Phi(u)              Phi(u) + u * phi(u)                 Phi the normal distribution function
    gelu_tanh      u * s                   s + u * s * (1 - s) * 2 dz/du       s = sigmoid(2 z), see gelu.py
    silu           u * s                   s + u * s * (1 - s)                 s = sigmoid(u)
    relu           max(u, 0)               1 where u > 0, else 0; 0 at 0
    relu_squared   max(u, 0)**2            2 * max(u, 0)

erfc and sigmoid keep the relative accuracy of the left tail that 1 + erf and 1 + tanh cancel away. Beyond _LIMIT all
factors have their limits, so |u| is clamped there wherever 0 * infinity would give a NaN; a NaN stays a NaN.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .dropout import keep_mask

__all__: list[str] = []

_LIMIT = 1000.0  # Phi and the sigmoids are 0 or 1 beyond it, in float64 too
_CUBIC = 0.044715


def _sigmoid_2z(u: Tensor) -> Tensor:
    return torch.sigmoid(math.sqrt(8.0 / math.pi) * (u + _CUBIC * u**3))


def _phi_integral(u: Tensor) -> Tensor:
    return 0.5 * torch.erfc(u * -math.sqrt(0.5))


def act(form: str, u: Tensor) -> Tensor:
    """The activation of u."""
    match form:
        case "relu":
            return torch.relu(u)
        case "relu_squared":
            return torch.relu(u).square()
    u = u.clamp(min=-_LIMIT)
    match form:
        case "silu":
            return u * torch.sigmoid(u)
        case "gelu_tanh":
            return u * _sigmoid_2z(u)
    return u * _phi_integral(u)


def derivative(form: str, u: Tensor) -> Tensor:
    """The activation's derivative at u."""
    match form:
        case "relu":
            return torch.ones_like(u).masked_fill(u <= 0, 0.0)
        case "relu_squared":
            return 2.0 * torch.relu(u)
    u = u.clamp(-_LIMIT, _LIMIT)
    match form:
        case "silu":
            s = torch.sigmoid(u)
            return s + u * s * torch.sigmoid(-u)
        case "gelu_tanh":
            s = _sigmoid_2z(u)
            slope = math.sqrt(8.0 / math.pi) * (1.0 + 3.0 * _CUBIC * u.square())
            return s + u * s * _sigmoid_2z(-u) * slope
    return _phi_integral(u) + u * torch.exp(-0.5 * u.square()) * math.sqrt(0.5 / math.pi)


def dropped(y: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """dropout of y, which is also the gradient of dropout for an upstream gradient y."""
    if seed is None:
        return y
    return torch.where(keep_mask(seed, y.shape, p), y * (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0.0)


def biased(x: Tensor, bias: Tensor | None) -> Tensor:
    """x + bias in float32 (float64 for float64), not rounded."""
    u = x if x.dtype == torch.float64 else x.float()
    return u if bias is None else u + bias


class Halves(NamedTuple):
    """Both factors before the activation, each with its bias added: packed or split, one way to read them."""

    gate: Tensor
    up: Tensor

    @classmethod
    def of(
        cls, gate: Tensor, up: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None, up_first: bool
    ) -> Halves:
        """gate, up (..., N), or gate packed (..., 2 N) with a packed bias and up None."""
        if up is not None:
            return cls(biased(gate, gate_bias), biased(up, up_bias))
        first, second = biased(gate, gate_bias).chunk(2, -1)
        return cls(second, first) if up_first else cls(first, second)

    def packed(self, up_first: bool) -> Tensor:
        """Both halves in one tensor (..., 2 N)."""
        return torch.cat((self.up, self.gate) if up_first else (self.gate, self.up), -1)


def row_sum(d: Tensor) -> Tensor:
    """(..., N) -> (N)."""
    return d.reshape(d.shape[:-1].numel(), d.shape[-1]).sum(0)
