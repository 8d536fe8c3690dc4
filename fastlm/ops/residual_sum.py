"""What add_layer_norm and add_rms_norm normalise: residual + dropout(x + x_bias), in plain PyTorch, and its gradients.

    residual_out = residual + mask * (x + x_bias) / (1 - p), in float32, rounded once to x's dtype
    mask: that of fastlm/ops/dropout.py, a function of the seed and of the place of an element; without dropout 1

Gradients, with d that of residual_out:
    d residual = d        d x = mask * d / (1 - p)        d x_bias = sum of the rows of d x
Without dropout d x is d residual: one tensor, computed and stored once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_floating, check_same_device, check_seed, check_vector
from ..samples import Bad, Normal, Values
from .dropout import keep_mask
from .dropout import peer as dropout_peer

__all__: list[str] = []


def wide(t: Tensor) -> Tensor:
    """In the dtype of statistics: float64 as it is, all others in float32."""
    return t if t.dtype == torch.float64 else t.float()


def _dropped(t: Tensor, seed: Tensor | None, p: float) -> Tensor:
    if seed is None:
        return t
    scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    return torch.where(keep_mask(seed, t.shape, p), t * scale, 0.0)


def residual_sum(
    x: Tensor, residual: Tensor, x_bias: Tensor | None, seed: Tensor | None, dropout_p: float
) -> Tensor:
    """residual + dropout(x + x_bias), rounded to x's dtype."""
    branch = wide(x) if x_bias is None else wide(x) + x_bias
    return (_dropped(branch, seed, dropout_p) + wide(residual)).to(x.dtype)


def split_gradient(
    d: Tensor, dtype: torch.dtype, seed: Tensor | None, dropout_p: float, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d, the unrounded gradient of residual_out -> those of x and residual in `dtype`, of x_bias in d's."""
    dx = _dropped(d, seed, dropout_p) if needs[0] or needs[2] else None
    return (
        dx.to(dtype) if dx is not None and needs[0] else None,
        d.to(dtype) if needs[1] else None,
        dx.reshape(-1, d.shape[-1]).sum(0) if dx is not None and needs[2] else None,
    )


def shares_gradient(dropout_p: float) -> bool:
    """Whether x and residual have one gradient."""
    return dropout_p == 0.0


def peer_sum(
    x: Tensor, residual: Tensor, x_bias: Tensor | None, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """What a PyTorch user writes today, with our mask."""
    branch = x if x_bias is None else x + x_bias.to(x.dtype)
    if dropout_p > 0:
        assert seed is not None
        branch = dropout_peer(branch, dropout_p, seed)
    return branch + residual


def sum_terms(upstream: list[Tensor], of_norm: float, dropout_p: float) -> dict[str, float]:
    """The largest sums of terms of d x and d residual: the norm's, and the gradient that reaches the sum itself."""
    total = of_norm + (upstream[1].abs().max().item() if upstream[1].numel() else 0.0)
    return {"x": total / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0, "residual": total}


def check_sum(
    x: Tensor, residual: Tensor, x_bias: Tensor | None, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, residual, seed) checked: of one dtype, and a seed where something is dropped, else None."""
    check_floating("x", x)
    check_floating("residual", residual)
    if x.shape != residual.shape:
        raise ValueError(f"residual: got shape {tuple(residual.shape)}; allowed: x's, {tuple(x.shape)}")
    if x.dim() == 0 or x.shape[-1] == 0:
        given = "a 0-dimensional tensor" if x.dim() == 0 else "a last dimension of 0"
        raise ValueError(f"x: got {given}; allowed: (..., N) with N >= 1")
    if x.dtype != residual.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    check_vector("x_bias", x_bias, x)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}; allowed: 0 to 1")
    if seed is not None:
        check_seed(seed)
    check_same_device(x=x, residual=residual, x_bias=x_bias, seed=seed)
    if dropout_p == 0:
        return x, residual, None
    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    return x, residual, seed


_f32 = torch.float32
_pair: dict[str, Any] = {"x": Normal((2, 4)), "residual": Normal((2, 4))}
bad_sums = (
    Bad("x integer", TypeError, r"x: .*int64.*floating", x=Values([[1, 2]], torch.int64), residual=Normal((1, 2))),
    Bad("residual integer", TypeError, r"residual: .*int64.*floating", x=Normal((1, 2)),
        residual=Values([[1, 2]], torch.int64)),
    Bad("residual shape", ValueError, r"residual: .*\(4,\).*\(2, 4\)", x=Normal((2, 4)), residual=Normal((4,))),
    Bad("no columns", ValueError, r"x: .*last dimension.*0", x=Normal((3, 0)), residual=Normal((3, 0))),
    Bad("weight shape", ValueError, r"weight: .*\(3,\).*\(4,\)", weight=Normal((3,)), **_pair),
    Bad("eps", ValueError, r"eps: .*-1", eps=-1.0, **_pair),
    Bad("x_bias shape", ValueError, r"x_bias: .*\(5,\).*\(4,\)", x_bias=Normal((5,)), **_pair),
    Bad("x_bias dtype", TypeError, r"x_bias: .*float64", x=Normal((2, 4), dtype=_f32),
        residual=Normal((2, 4), dtype=_f32), x_bias=Normal((4,), dtype=torch.float64)),
    Bad("dropout_p", ValueError, r"dropout_p: .*1\.5.*0 to 1", dropout_p=1.5, **_pair),
    Bad("dropout_p NaN", ValueError, r"dropout_p: .*nan.*0 to 1", dropout_p=float("nan"), **_pair),
    Bad("seed int", TypeError, r"seed: .*int.*tensor", dropout_p=0.5, seed=3, **_pair),
    Bad("seed float", TypeError, r"seed: .*float32.*int64", dropout_p=0.5, seed=Values([1.0]), **_pair),
    Bad("seeds", ValueError, r"seed: .*\(2,\).*one element", dropout_p=0.5, seed=Values([1, 2], torch.int64), **_pair),
)  # fmt: skip
