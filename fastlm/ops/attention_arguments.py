"""What attention and varlen_attention both take beside q, k and v: the checks, and what the options mean in numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import check_floating

__all__ = ["band", "check_dropout", "check_head_counts", "check_int", "check_options", "check_qkv"]

_MAX_HEAD_DIM = 256


def band(causal: bool, window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    """(left, right): how far back and forward a query sees, -1 for unbounded."""
    left, right = (-1 if w is None else w for w in window or (None, None))
    return left, (0 if causal else right)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, dims: int, layout: str) -> None:
    """Dtypes, numbers of dimensions and head dims, as both ops take them."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_floating(name, t)
        if t.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {t.dtype}; allowed: q's dtype {q.dtype}")
        if t.dim() != dims:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}; allowed: {layout}")
    for name, t in (("q", q), ("v", v)):
        if not 1 <= t.shape[-1] <= _MAX_HEAD_DIM:
            raise ValueError(f"{name}: got head_dim {t.shape[-1]}; allowed: 1 to {_MAX_HEAD_DIM}")


def check_head_counts(heads: int, key_heads: int) -> None:
    """Query heads come in equal groups."""
    if key_heads == 0 or heads % key_heads or heads == 0:
        raise ValueError(
            f"k: got {key_heads} heads; allowed: 1 or more, a number that divides {heads}, q's heads"
        )


def check_int(name: str, t: Tensor, shape: tuple[int, ...], what: str) -> None:
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got dtype {t.dtype}; allowed: int32 or int64")
    if t.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(t.shape)}; allowed: {shape}, {what}")


def _check_small(name: str, t: Tensor, shapes: tuple[tuple[int, ...], ...], q: Tensor) -> None:
    check_floating(name, t)
    if t.shape not in shapes:
        raise ValueError(f"{name}: got shape {tuple(t.shape)}; allowed: {' or '.join(map(str, shapes))}")
    if t.dtype not in (q.dtype, torch.float32) or (q.dtype == torch.float64 and t.dtype != q.dtype):
        raise TypeError(f"{name}: got dtype {t.dtype}; allowed: q's dtype {q.dtype} or float32")


def check_options(
    q: Tensor, batch: int, heads: int, queries: int, keys: int, *, alignment: str,
    window: tuple[int | None, int | None] | None, softcap: float | None, alibi_slopes: Tensor | None,
    bias: Tensor | None, relative_bias: Tensor | None, relative_bidirectional: bool, relative_max_distance: int,
    key_lengths: Tensor | None, sinks: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """What both ops take beside q, k and v; returns the bias with 4 dimensions."""
    if alignment not in ("bottom-right", "top-left"):
        raise ValueError(f'alignment: got {alignment!r}; allowed: "bottom-right" or "top-left"')
    if window is not None and (len(window) != 2 or any(w is not None and w < -1 for w in window)):
        raise ValueError(f"window: got {window}; allowed: (left, right), each >= 0, or None or -1 for unbounded")
    if softcap is not None and not (math.isfinite(softcap) and softcap >= 0.0):
        raise ValueError(f"softcap: got {softcap}; allowed: a finite number > 0, or 0 or None for none")
    if key_lengths is not None:
        check_int("key_lengths", key_lengths, (batch,), "one a batch")
    if alibi_slopes is not None:
        _check_small("alibi_slopes", alibi_slopes, ((heads,), (batch, heads)), q)
    if sinks is not None:
        _check_small("sinks", sinks, ((heads,),), q)
    if relative_bias is not None:
        buckets = relative_bias.shape[0] if relative_bias.dim() == 2 else 0
        _check_small("relative_bias", relative_bias, ((max(buckets, 2), heads),), q)
        one_way = buckets // 2 if relative_bidirectional else buckets
        if one_way < 2 or (relative_bidirectional and buckets % 2):
            allowed = "an even number >= 4 when bidirectional" if relative_bidirectional else "at least 2"
            raise ValueError(f"relative_bias: got {buckets} buckets; allowed: {allowed}")
        if relative_max_distance <= one_way // 2:
            raise ValueError(
                f"relative_max_distance: got {relative_max_distance}; allowed: more than {one_way // 2}, the "
                "distances with a bucket of their own"
            )
    if bias is None:
        return None
    if not isinstance(bias, Tensor) or bias.dtype not in (torch.bool, q.dtype, torch.float32):
        raise TypeError(
            f"bias: got {getattr(bias, 'dtype', type(bias).__name__)}; allowed: q's dtype {q.dtype}, float32 or bool"
        )
    shape, full = (1,) * (4 - bias.dim()) + tuple(bias.shape), (batch, heads, queries, keys)
    if len(shape) > 4 or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}; allowed: what broadcasts to {full}")
    return bias.reshape(shape)


def check_dropout(p: float, seed: Tensor | None, device: torch.device, tape: Any) -> Tensor | None:
    """The seed to use: given, drawn from torch's generator, or None without dropout."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p: got {p}; allowed: [0, 1)")
    if p == 0.0:
        return None
    if seed is None:
        if tape is not None:
            raise ValueError("dropout_seed: got None on a tape; allowed: an int64 tensor of one element")
        return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
    if seed.dtype != torch.int64:
        raise TypeError(f"dropout_seed: got dtype {seed.dtype}; allowed: int64")
    if seed.numel() != 1:
        raise ValueError(f"dropout_seed: got shape {tuple(seed.shape)}; allowed: one element")
    return seed
