"""The formula of attention and its gradients in plain PyTorch, shared by `attention` and `varlen_attention`.

Derived in the docstring of fastlm/ops/attention.py. Everything here is dense: (batch, heads, queries, keys).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..philox import drop_threshold, philox_lanes

__all__ = ["attention_dropout_mask", "relative_position_bucket"]


def attention_dropout_mask(
    dropout_seed: Tensor, dropout_p: float, batch: int, heads: int, queries: int, keys: int
) -> Tensor:
    """Which attention weights dropout keeps: bool (batch, heads, queries, keys), the same on every backend.

    Args:
        dropout_seed: int64, one element.
        dropout_p: probability of dropping, in [0, 1).
    """
    b, h, i, j = (torch.arange(n, device=dropout_seed.device) for n in (batch, heads, queries, -(-keys // 4)))
    words = philox_lanes(dropout_seed, j, i[:, None], h[:, None, None], b[:, None, None, None])[..., :keys]
    return words >= drop_threshold(dropout_p)


@lru_cache
def _bucket_starts(num_buckets: int, max_distance: int) -> tuple[int, ...]:
    """The smallest distance in bucket 1, 2, ... of one direction: exact up to the half, then logarithmic."""
    exact = num_buckets // 2
    starts = list(range(1, exact + 1))
    for n in range(exact + 1, max_distance + 1):
        # 1e-9: distances that are exact powers belong to the bucket they begin, whatever the logarithm's rounding.
        place = math.log(n / exact) / math.log(max_distance / exact) * (num_buckets - exact) + 1e-9
        starts += [n] * (min(exact + int(place), num_buckets - 1) - len(starts))
    return tuple(starts)


def relative_position_bucket(
    distance: Tensor, num_buckets: int, bidirectional: bool = True, max_distance: int = 128
) -> Tensor:
    """T5's bucket of each distance j - i (key position minus query position): int64, of distance's shape.

    Half of a direction's buckets hold one distance each, the others grow logarithmically up to max_distance, beyond
    which all share the last. bidirectional: the upper half of the buckets is for keys after the query; otherwise
    those share bucket 0.

    Source: Raffel et al. (2020), arXiv:1910.10683, section 2.1; buckets equal to those of transformers' T5.
    """
    one_way = num_buckets // 2 if bidirectional else num_buckets
    away = distance.abs() if bidirectional else (-distance).clamp(min=0)
    bucket = torch.zeros_like(distance, dtype=torch.int64)
    for start in _bucket_starts(one_way, max_distance):
        bucket += away >= start
    return bucket + one_way * (distance > 0) if bidirectional else bucket


@dataclass(frozen=True)
class Problem:
    """Everything that shapes the weights beside q and k; as the arguments of the op `attention`.

    query_lengths: (batch,) int64 for a padded batch of sequences of their own lengths, with key_lengths; None where
    every sequence has all queries and the padded number of keys counts for the alignment.
    """

    bias: Tensor | None
    relative_bias: Tensor | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    key_lengths: Tensor | None
    segment_ids: Tensor | None
    key_segment_ids: Tensor | None
    dropout_seed: Tensor | None
    left: int
    right: int
    top_left: bool
    scale: float
    softcap: float
    bidirectional: bool
    max_distance: int
    dropout_p: float
    query_lengths: Tensor | None = None
    sequence_keys: Tensor | None = None


def wide(t: Tensor) -> Tensor:
    """float32, or float64 for float64."""
    return (t if t.dtype == torch.float64 else t.float()).contiguous()


def distances(q: Tensor, k: Tensor, p: Problem) -> Tensor:
    """Key position minus query position, (queries, keys), or (batch, 1, queries, keys) where lengths differ."""
    i, j = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
    if p.top_left:
        return j - i
    if p.query_lengths is None or p.sequence_keys is None:
        return j - i - (k.shape[2] - q.shape[2])
    return j - i - (p.sequence_keys - p.query_lengths)[:, None, None, None]


def _exists(p: Problem, keys: int) -> Tensor | None:
    """(batch, 1, keys, 1): which keys there are."""
    if p.key_lengths is None:
        return None
    return (torch.arange(keys, device=p.key_lengths.device) < p.key_lengths[:, None])[:, None, :, None]


def _existing(t: Tensor, p: Problem) -> Tensor:
    """Keys or values (batch, heads, keys, width) in float32; 0 beyond the lengths, where nothing is read."""
    exists = _exists(p, t.shape[2])
    return wide(t) if exists is None else wide(t).masked_fill(~exists, 0.0)


def _visible(q: Tensor, k: Tensor, p: Problem) -> Tensor | None:
    """Broadcasts to (batch, heads, queries, keys): which keys each query sees; None for all."""
    exists = _exists(p, k.shape[2])
    conditions = [] if exists is None else [exists.transpose(2, 3)]
    if p.left >= 0 or p.right >= 0:
        d = distances(q, k, p)
        conditions += [d >= -p.left] if p.left >= 0 else []
        conditions += [d <= p.right] if p.right >= 0 else []
    if p.segment_ids is not None and p.key_segment_ids is not None:
        conditions += [p.segment_ids[:, None, :, None] == p.key_segment_ids[:, None, None, :]]
    if p.bias is not None and p.bias.dtype == torch.bool:
        conditions += [p.bias]
    visible = None
    for condition in conditions:
        visible = condition if visible is None else visible & condition
    return visible


def _buckets(q: Tensor, k: Tensor, p: Problem, d: Tensor) -> Tensor:
    assert p.relative_bias is not None
    return relative_position_bucket(d, p.relative_bias.shape[0], p.bidirectional, p.max_distance)


def _group(t: Tensor, k: Tensor) -> Tensor:
    """(batch, heads, queries, n) as (batch, key heads, group * queries, n): the heads that read one key head."""
    batch, heads, queries, width = t.shape
    return t.reshape(batch, k.shape[1], heads // k.shape[1] * queries, width)


def _scores(q: Tensor, k: Tensor, p: Problem) -> tuple[Tensor, Tensor | None]:
    """S in float32, (batch, heads, queries, keys), -inf where nothing is seen, and the soft cap's derivative."""
    # The group's queries stand one after another, so that grouped heads are one product a key head.
    s = (_group(wide(q), k) @ _existing(k, p).transpose(-1, -2)) * p.scale
    s = s.reshape(*q.shape[:3], k.shape[2])
    slope = None
    if p.softcap:
        bent = torch.tanh(s / p.softcap)
        s, slope = p.softcap * bent, 1.0 - bent * bent
    if p.bias is not None and p.bias.dtype != torch.bool:
        s = s + p.bias.to(s.dtype)
    if p.relative_bias is not None or p.alibi_slopes is not None:
        d = distances(q, k, p)
        if p.relative_bias is not None:
            table = p.relative_bias.to(s.dtype)[_buckets(q, k, p, d)]  # (..., queries, keys, heads)
            s = s + (table.squeeze(1) if table.dim() == 5 else table).movedim(-1, -3)
        if p.alibi_slopes is not None:
            s = s - p.alibi_slopes.to(s.dtype)[..., None, None] * d.abs()
    visible = _visible(q, k, p)
    return (s if visible is None else s.masked_fill(~visible, -torch.inf)), slope


def _weights(s: Tensor, lse: Tensor) -> Tensor:
    """exp(S - lse); 0 for a query that sees nothing, whose lse is -inf."""
    return (s - lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1)).exp()


def _keep(q: Tensor, k: Tensor, p: Problem, dtype: torch.dtype) -> Tensor | None:
    """M' of the module's docstring; None without dropout."""
    if p.dropout_seed is None:
        return None
    batch, heads, queries, _ = q.shape
    mask = attention_dropout_mask(p.dropout_seed, p.dropout_p, batch, heads, queries, k.shape[2])
    return mask.to(dtype) / (1.0 - p.dropout_p)


def forward(q: Tensor, k: Tensor, v: Tensor, p: Problem) -> tuple[Tensor, Tensor]:
    """q (B, H, Sq, D), k (B, Hk, Sk, D), v (B, Hk, Sk, Dv) -> out (B, H, Sq, Dv) and lse (B, H, Sq), in float32."""
    s, _ = _scores(q, k, p)
    every = s
    if p.sinks is not None:
        every = torch.cat([s, p.sinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)], -1)
    blind = (every == -torch.inf).all(-1, keepdim=True)
    # A blind row gets finite scores on the way, so that autograd of this function has no NaN either.
    lse = every.masked_fill(blind, 0.0).logsumexp(-1).masked_fill(blind.squeeze(-1), -torch.inf)
    weights = _weights(s, lse)
    keep = _keep(q, k, p, weights.dtype)
    if keep is not None:
        weights = weights * keep
    return (_group(weights, k) @ _existing(v, p)).reshape(*q.shape[:3], v.shape[3]), lse


def backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, p: Problem, out: Tensor,
    lse: Tensor, needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dq, dk, dv, d_bias, d_relative_bias, d_sinks in float32; None where not needed."""
    dq = dk = dv = d_bias = d_relative = d_sinks = None
    s, slope = _scores(q, k, p)
    weights = _weights(s, lse)
    keep = _keep(q, k, p, weights.dtype)
    dout = torch.zeros_like(out) if dout is None else dout
    g = _group(wide(dout), k)
    if needs[2]:
        kept = weights if keep is None else weights * keep
        dv = _group(kept, k).transpose(-1, -2) @ g
    delta = (wide(dout) * wide(out)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    if needs[5] and p.sinks is not None:
        # exp(sink - lse) of a blind row: its lse is the sink's, or -inf with it
        share = (p.sinks.to(lse.dtype)[:, None] - lse).exp().masked_fill(lse == -torch.inf, 0.0)
        d_sinks = -(share * delta).sum((0, 2))
    if not any((needs[0], needs[1], needs[3], needs[4])):
        return dq, dk, dv, d_bias, d_relative, d_sinks
    dw = (g @ _existing(v, p).transpose(-1, -2)).reshape(weights.shape)
    if keep is not None:
        dw = dw * keep
    ds = weights * (dw - delta.unsqueeze(-1))
    if needs[3] and p.bias is not None and p.bias.is_floating_point():
        d_bias = ds.sum_to_size(p.bias.shape)
    if needs[4] and p.relative_bias is not None:
        d_relative = _relative_gradient(ds, q, k, p)
    if slope is not None:
        ds = ds * slope
    ds = _group(ds * p.scale, k)
    if needs[0]:
        dq = (ds @ _existing(k, p)).reshape(q.shape)
    if needs[1]:
        dk = ds.transpose(-1, -2) @ _group(wide(q), k)
    return dq, dk, dv, d_bias, d_relative, d_sinks


def absolute_terms(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, p: Problem, out: Tensor, lse: Tensor
) -> dict[str, float]:
    """Of each gradient that is a sum of dS, whose terms may cancel, the largest sum of absolute terms."""
    s, slope = _scores(q, k, p)
    weights = _weights(s, lse)
    keep = _keep(q, k, p, weights.dtype)
    dw = (_group(dout, k) @ _existing(v, p).transpose(-1, -2)).reshape(weights.shape).abs()
    delta = (dout * out).abs().sum(-1) + (0.0 if dlse is None else dlse.abs())
    ds = weights * ((dw if keep is None else dw * keep) + delta.unsqueeze(-1))
    dx = _group(ds * abs(p.scale) * (1.0 if slope is None else slope), k)
    sums = {"q": dx @ _existing(k, p).abs(), "k": dx.transpose(-1, -2) @ _group(q.abs(), k)}
    if p.bias is not None and p.bias.is_floating_point():
        sums["bias"] = ds.sum_to_size(p.bias.shape)
    if p.relative_bias is not None:
        sums["relative_bias"] = _relative_gradient(ds, q, k, p)
    if p.sinks is not None:
        share = (p.sinks[:, None] - lse).exp().masked_fill(lse == -torch.inf, 0.0)
        sums["sinks"] = (share * delta).sum((0, 2))
    return {name: total.max().item() if total.numel() else 0.0 for name, total in sums.items()}


class Arguments:
    """A tape that only keeps what the op is called with."""

    args: tuple[Any, ...]

    def forward(self, op: Any, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        self.args = args
        return tuple(op.forward(*args)[: op.results])


def _relative_gradient(ds: Tensor, q: Tensor, k: Tensor, p: Problem) -> Tensor:
    """(num_buckets, heads): ds summed along diagonals, then over the diagonals of a bucket."""
    assert p.relative_bias is not None
    queries, keys = ds.shape[2:]
    if ds.numel() == 0:
        return ds.new_zeros(p.relative_bias.shape)
    # With the rows turned round and the row length one less, j - i + queries - 1 is the column.
    skewed = F.pad(ds.flip(2), (0, queries)).flatten(2)[..., : queries * (keys + queries - 1)]
    diagonals = skewed.unflatten(2, (queries, -1)).sum(2)  # (batch, heads, diagonals)
    first = distances(q, k, p)[..., -1:, :1].reshape(-1, 1)  # of the last query and the first key
    d = first + torch.arange(diagonals.shape[2], device=ds.device)  # (1 or batch, diagonals)
    here = F.one_hot(_buckets(q, k, p, d), p.relative_bias.shape[0]).to(ds.dtype)
    return (diagonals @ here).sum(0).t()
