"""Argument checks shared by the public functions: each error names the argument, what was given, what is allowed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["check_dropout", "check_floating", "check_same_device", "check_seed", "check_vector"]

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The operands of a matrix product: under ``torch.autocast`` in its dtype, as PyTorch's are, else as they are."""
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


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


def check_seed(seed: object) -> None:
    """seed must be an int64 tensor of one element."""
    if not isinstance(seed, Tensor):
        raise TypeError(f"seed: got {type(seed).__name__}; allowed: a tensor of dtype int64, or None")
    if seed.dtype != torch.int64:
        raise TypeError(f"seed: got dtype {seed.dtype}; allowed: torch.int64")
    if seed.numel() != 1:
        raise ValueError(f"seed: got shape {tuple(seed.shape)}; allowed: one element")


def check_dropout(p: float, seed: Tensor | None, x: Tensor, tape: Any) -> Tensor | None:
    """The seed of a fused dropout: given, drawn from torch's generator of x's device, or None where nothing is dropped."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p: got {p}; allowed: 0 to 1")
    if p == 0.0:
        return None
    if seed is None:
        if tape is not None:
            raise ValueError("seed: got None on a tape; allowed: an int64 tensor of one element")
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    check_seed(seed)
    return seed
