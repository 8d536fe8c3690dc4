"""Argument checks shared by the public functions: each error names the argument, what was given, what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_floating", "check_same_device", "check_vector"]

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floating(name: str, x: object) -> None:
    """x must be a tensor of a floating-point dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}; allowed: a floating-point tensor")
    if x.dtype not in _FLOATING:
        raise TypeError(
            f"{name}: got dtype {x.dtype}; allowed: a floating-point dtype ({', '.join(map(str, _FLOATING))})"
        )


def check_vector(name: str, v: Tensor | None, x: Tensor) -> None:
    """v must be None or (N,) for x (..., N), of x's dtype or float32."""
    if v is None:
        return
    check_floating(name, v)
    if v.shape != x.shape[-1:]:
        raise ValueError(
            f"{name}: got shape {tuple(v.shape)}; allowed: {tuple(x.shape[-1:])}, the last dimension of x"
        )
    if v.dtype not in (x.dtype, torch.float32) or (x.dtype == torch.float64 and v.dtype != x.dtype):
        raise TypeError(
            f"{name}: got dtype {v.dtype}; allowed: x's dtype {x.dtype}"
            + (" or float32" if x.dtype != torch.float64 else "")
        )


def check_same_device(**tensors: Tensor | None) -> None:
    """All tensors must be on one device."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(
            f"{', '.join(devices)}: got devices {', '.join(map(str, devices.values()))}; allowed: one device for all"
        )
