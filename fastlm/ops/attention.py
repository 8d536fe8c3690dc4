"""Scaled dot-product attention: self- and cross-attention, with everything that shapes its scores or its weights.

    X = scale * Q K^T                             C = softcap * tanh(X / softcap), or X without a soft cap
    S = C + bias + relative_bias[bucket(j - p_i), h] - slope_h |j - p_i|,   -inf where query i does not see key j
    lse_i = log(sum_j exp(S_ij) + exp(sink_h))    P = exp(S - lse)    M'_ij = keep_ij / (1 - p)    O = (P * M') V

p_i, the position of query i among the keys, is i + Sk - Sq (alignment "bottom-right": the last query stands at the
last key, the padded one where there are lengths) or i ("top-left", PyTorch's). Query head h reads key head
h // (H / Hk). Query i of batch b sees key j if all of these hold: j <= p_i when causal; p_i - left <= j <= p_i + right
with a window; j < key_lengths[b]; segment_ids[b, i] == key_segment_ids[b, j]; a boolean bias is True there. A query
that sees no key is blind: its output is 0, its lse -inf (the sink's with a sink), all its gradients 0. Keys and values
beyond key_lengths are never read: what stands there, NaN included, does not matter, and their gradient is 0.

Gradients, with G = dO, L = dlse and sums over a head (for dK and dV over the group of query heads that reads it):
    dV = (P * M')^T G                       dP = M' * (G V^T)
    The softmax: dS_ij = P_ij (dP_ij - sum_k P_ik dP_ik). Since O_ic = sum_k P_ik M'_ik V_kc, the sum is
    delta_i = sum_c G_ic O_ic, dropout included; the sink takes part in it with value 0.
    lse: d lse_i / d S_ij = P_ij, so that L_i adds L_i P_ij. Together dS = P * (dP - (delta - L)).
    dbias = dS, summed over the dimensions in which bias is broadcast.
    drelative_bias[t, h] = sum of dS_ij over batch and all i, j with bucket(j - p_i) = t: dS summed along diagonals,
    then over the diagonals of a bucket; only the (Sq + Sk) sums of diagonals are ever stored.
    dsink_h = sum_bi exp(sink_h - lse_i) (0 - delta_i + L_i), a column of dS whose dP is 0.
    The soft cap: dX = dS * (1 - (C / softcap)^2), by tanh' = 1 - tanh^2. dQ = scale dX K, dK = scale dX^T Q.
    ALiBi's slopes are constants and have no gradient.

Dropout: weight (batch b, query head h, query i, key j) is kept if word j & 3 of Philox4x32-10, with the seed
as its key and the counter (j >> 2, i, h, b), is >= floor(p 2**32); see fastlm/philox.py. The mask depends
neither on tiles nor on the backend and is never stored; lse is that of the scores without dropout.

Saved: every tensor as given, out, and lse in float32 (float64 for float64).

Edge cases
 1  causal self-attention                                14  scale 0: the mean of the visible values
 2  grouped-query heads, Sq < Sk, key lengths            15  window on both sides, soft cap
 3  cross-attention, D and Dv different and odd          16  ALiBi, a slope a batch and head; causal window
 4  causal with Sq > Sk: the first queries are blind     17  bias, one for all batches; returned lse
 5  key lengths of 0, beyond Sk, negative                18  bias of one row for all heads and queries
 6  Sk = 0: every output is 0                            19  boolean bias (a mask) with blind queries
 7  Sq = 0                                               20  T5's bias in both directions, max_distance < Sk
 8  no batch                                             21  T5's bias in one direction, causal, grouped heads
 9  one query, one key, D = 1                            22  packed documents of 0, 1 and more keys
10  weights peaked on few keys                           23  segment ids in no order, queries without a key
11  dropout with grouped-query heads                     24  sinks with blind queries; returned lse
12  wide heads                                           25  top-left alignment, Sq < Sk
13  negative scale: largest score, smallest product      26  everything together

Source: Vaswani et al., "Attention is all you need" (2017), arXiv:1706.03762, equation 1; backward and log-sum-exp:
Dao, "FlashAttention-2" (2023), arXiv:2307.08691, section 3.1; grouped heads: Ainslie et al. (2023), arXiv:2305.13245;
relative bias: Raffel et al. (2020), arXiv:1910.10683, section 2.1; ALiBi: Press et al. (2021), arXiv:2108.12409;
soft cap: Gemma 2 (2024), arXiv:2408.00118, section 2; sinks: gpt-oss (2025), arXiv:2508.10925, section 2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import autocast, check_same_device
from ..registry import Cost, Op, Spec, register
from . import attention_math as core
from .attention_arguments import band, check_dropout, check_head_counts, check_int, check_options, check_qkv
from .attention_math import Problem
from .attention_samples import case, errors, random, samples, shapes

__all__ = ["attention"]

_HEADS_INSIDE = (0, 2, 1, 3)  # memory order (batch, seq, heads, head_dim): merging the heads is a view


def _heads_inside(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """q (B, H, Sq, D), k (B, Hk, Sk, D), v (B, Hk, Sk, Dv) -> out (B, H, Sq, Dv), lse (B, H, Sq)."""
    out, lse = core.forward(q, k, v, Problem(*rest))
    return _heads_inside(out, q.dtype), lse


def backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    """dout (B, H, Sq, Dv), dlse (B, H, Sq) -> dq, dk, dv like q, k, v; d_bias; d_relative_bias, d_sinks in float32."""
    *terms, needs = rest
    out, lse = terms[8:10]
    problem = Problem(*terms[:8], *terms[10:])
    dq, dk, dv, *others = core.backward(dout, dlse, q, k, v, problem, out, lse, needs)
    heads = [
        None if d is None else _heads_inside(d, t.dtype) for d, t in zip((dq, dk, dv), (q, k, v), strict=True)
    ]
    if others[0] is not None and problem.bias is not None:
        others[0] = others[0].to(problem.bias.dtype)
    return (*heads, *others)


def outputs(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Spec, ...]:
    """out; lse."""
    lse = Spec(tuple(q.shape[:3]), torch.float64 if q.dtype == torch.float64 else torch.float32)
    return Spec((*q.shape[:3], v.shape[3]), q.dtype, _HEADS_INSIDE), lse


def gradients(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *terms: Any
) -> tuple[Spec, ...]:
    """dq, dk, dv, d_bias, d_relative_bias, d_sinks."""
    heads = (Spec(tuple(t.shape), t.dtype, _HEADS_INSIDE) for t in (q, k, v))
    return *heads, *added_gradients(q, *terms[:3])


def added_gradients(
    q: Tensor, bias: Tensor | None, relative_bias: Tensor | None, sinks: Tensor | None
) -> tuple[Spec, ...]:
    """d_bias, d_relative_bias, d_sinks, as both ops have them."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        Spec((0,), wide) if bias is None else Spec(tuple(bias.shape), bias.dtype),
        *(Spec((0,) if t is None else tuple(t.shape), wide) for t in (relative_bias, sinks)),
    )


def _ints(t: Tensor | None) -> list[Any] | None:
    """Values to count with; None where there are none to read."""
    return None if t is None or t.device.type == "meta" else t.tolist()


def visible_pairs(
    queries: int, keys: int, left: int, right: int, shift: int, length: int, segments: list[int] | None = None,
    key_segments: list[int] | None = None,
) -> int:  # fmt: skip
    """How many pairs of one head are seen. left, right: -1 for unbounded."""
    if segments is not None and key_segments is not None:
        d = torch.arange(min(length, keys)) - torch.arange(queries)[:, None] - shift
        seen = torch.tensor(segments)[:, None] == torch.tensor(key_segments)[: min(length, keys)]
        seen &= (d >= -left) | (left < 0)
        return int((seen & ((d <= right) | (right < 0))).sum())
    total = 0
    for i in range(shift, shift + queries):
        first = max(i - left, 0) if left >= 0 else 0
        total += max((min(i + right + 1, length) if right >= 0 else length) - first, 0)
    return total


def cost(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, alignment: str = "bottom-right",
    window: tuple[int | None, int | None] | None = None, bias: Tensor | None = None,
    key_lengths: Tensor | None = None, segment_ids: Tensor | None = None, key_segment_ids: Tensor | None = None,
    **_: Any,
) -> Cost:  # fmt: skip
    """2 products forward, 5 backward, over the pairs that are seen, as far as values can be read (not on "meta").

    Forward reads q, k, v and the bias and writes out and lse; backward reads these and dout and writes the gradients.
    A boolean bias counts as all seen.
    """
    batch, heads, queries, width = q.shape
    keys, v_width = k.shape[2], v.shape[3]
    left, right = band(causal, window)
    lengths, ids = _ints(key_lengths), _ints(segment_ids)
    key_ids = ids if key_segment_ids is None else _ints(key_segment_ids)
    pairs = 0.0
    for b in range(batch if lengths or ids else min(batch, 1)):
        length = keys if lengths is None else min(max(lengths[b], 0), keys)
        row = (ids[b], key_ids[b]) if ids is not None and key_ids is not None else (None, None)
        shift = keys - queries if alignment == "bottom-right" else 0
        pairs += visible_pairs(queries, keys, left, right, shift, length, *row)
    pairs *= heads * (1 if lengths or ids else batch)
    inputs = q.nbytes + k.nbytes + v.nbytes + (0 if bias is None else bias.nbytes)
    out = batch * heads * queries * (v_width * q.element_size() + 4)
    return Cost(
        2 * pairs * (width + v_width), inputs + out, 2 * pairs * (3 * width + 2 * v_width), 2 * (inputs + out)
    )


def _hf_bucket(d: Tensor, buckets: int, bidirectional: bool, max_distance: int) -> Tensor:
    """T5's bucket as models write it, in float32: independent of the thresholds of relative_position_bucket."""
    offset = torch.zeros_like(d)
    if bidirectional:
        buckets //= 2
        offset = (d > 0).long() * buckets
        d = d.abs()
    else:
        d = -torch.minimum(d, torch.zeros_like(d))
    exact = buckets // 2
    far = exact + (
        torch.log(d.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    ).long()
    return offset + torch.where(d < exact, d, far.clamp(max=buckets - 1))


def peer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    alignment: str = "bottom-right",
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    relative_bidirectional: bool = True,
    relative_max_distance: int = 128,
    key_lengths: Tensor | None = None,
    segment_ids: Tensor | None = None,
    key_segment_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention as models write it out: products in the inputs' dtype, softmax in float32.

    F.scaled_dot_product_attention has none of these options but a mask, and NaN where a query is blind.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    queries, keys = q.shape[2], k.shape[2]
    s = (q @ k.transpose(-1, -2)) * (1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    s = s.to(wide)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    j = torch.arange(keys, device=q.device)
    position = torch.arange(queries, device=q.device)[:, None]
    if alignment == "bottom-right":
        position = position + keys - queries
    mask = torch.ones((queries, keys), dtype=torch.bool, device=q.device)
    if causal:
        mask = mask & (j <= position)
    if window is not None and window[0] is not None and window[0] >= 0:
        mask = mask & (j >= position - window[0])
    if window is not None and window[1] is not None and window[1] >= 0:
        mask = mask & (j <= position + window[1])
    mask = mask.expand(s.shape)
    if key_lengths is not None:
        mask = mask & (j < key_lengths[:, None, None, None])
    if segment_ids is not None:
        other = segment_ids if key_segment_ids is None else key_segment_ids
        mask = mask & (segment_ids[:, None, :, None] == other[:, None, None])
    if bias is not None:
        if bias.dtype == torch.bool:
            mask = mask & bias
        else:
            s = s + bias.to(wide)
    if relative_bias is not None:
        d = _hf_bucket(j - position, relative_bias.shape[0], relative_bidirectional, relative_max_distance)
        s = s + torch.nn.functional.embedding(d, relative_bias.to(wide)).permute(2, 0, 1)
    if alibi_slopes is not None:
        slopes = alibi_slopes if alibi_slopes.dim() == 2 else alibi_slopes[None]
        s = s - slopes[:, :, None, None] * (position - j).abs()
    blind = ~mask.any(-1, keepdim=True)
    s = s.masked_fill(~mask & ~blind, -torch.inf)
    if sinks is not None:
        s = torch.cat([s.masked_fill(blind, -torch.inf), sinks.to(wide)[:, None, None].expand(*s.shape[:3], 1)], -1)
        lse = s.logsumexp(-1)
        p = s.softmax(-1)[..., :-1]
    else:
        lse = s.logsumexp(-1).masked_fill(blind.squeeze(-1), -torch.inf)
        p = s.softmax(-1)
    p = p.to(q.dtype).masked_fill(blind, 0.0)
    if dropout_p:
        assert dropout_seed is not None
        p = p * core.attention_dropout_mask(dropout_seed, dropout_p, *p.shape) / (1.0 - dropout_p)
    out = p @ v
    return (out, lse) if return_lse else out


def terms(upstream: list[Tensor], *args: Any, **options: Any) -> dict[str, float]:
    """The largest sums of absolute terms of the gradients that are sums of dS."""
    call = core.Arguments()
    attention(*args, **options, tape=call)
    q, k, v, *rest = call.args
    out, lse = forward(*call.args)
    return core.absolute_terms(upstream[0], upstream[1] if len(upstream) > 1 else None, q, k, v, Problem(*rest), out, lse)


op = register(
    Op(
        name="attention",
        schema="(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? relative_bias, Tensor? sinks, "
        "Tensor? alibi_slopes, Tensor? key_lengths, Tensor? segment_ids, Tensor? key_segment_ids, "
        "Tensor? dropout_seed, int left, int right, bool top_left, float scale, float softcap, bool bidirectional, "
        "int max_distance, float dropout_p) -> (Tensor out, Tensor lse)",
        forward=forward,
        backward=backward,
        outputs=outputs,
        gradients=gradients,
        cost=cost,
        peer=peer,
        samples=samples,
        errors=errors,
        random=random,
        case=case,
        shapes=shapes,
        terms=terms,
        grads=("q", "k", "v", "bias", "relative_bias", "sinks"),
        accumulates=("relative_bias", "sinks"),
        saved=(
            "q", "k", "v", "bias", "relative_bias", "sinks", "alibi_slopes", "key_lengths", "segment_ids",
            "key_segment_ids", "dropout_seed", "out", "lse",
        ),
        results=2,
        contiguous=False,
    )
)


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_qkv(q, k, v, 4, "(batch, heads, seq, head_dim)")
    batch, heads, _, width = q.shape
    if k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(
            f"k: got shape {tuple(k.shape)}; allowed: ({batch}, heads, seq, {width}), to go with q"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v: got shape {tuple(v.shape)}; allowed: ({', '.join(map(str, k.shape[:3]))}, head_dim), as k"
        )
    check_head_counts(heads, k.shape[1])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    alignment: str = "bottom-right",
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    relative_bidirectional: bool = True,
    relative_max_distance: int = 128,
    key_lengths: Tensor | None = None,
    segment_ids: Tensor | None = None,
    key_segment_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    tape: Any = None,
) -> Any:
    """softmax(scale * q k^T + ...) v, without holding the (Sq, Sk) weights. All options combine.

    Args:
        q: (B, H, Sq, D), floating-point; D from 1 to 256, Sq any, 0 included.
        k: (B, Hk, Sk, D), of q's dtype; Hk divides H, and query head h reads key head h // (H / Hk); Sk any.
        v: (B, Hk, Sk, Dv), of q's dtype; Dv from 1 to 256.
        causal: query i sees keys up to its position.
        alignment: where query i stands among the keys: "bottom-right", at i + Sk - Sq, so that the last query sees
            every key; "top-left", at i, as PyTorch. It holds for causal, window, ALiBi and relative_bias.
        scale: finite; None for 1 / sqrt(D).
        window: (left, right), in keys: a query at p sees keys p - left to p + right; None or -1 for unbounded.
        softcap: c > 0 bends the scaled scores to c * tanh(x / c); 0 or None for none.
        alibi_slopes: (H,) or (B, H), of q's dtype or float32, without a gradient: adds -slope * |distance|.
        bias: what broadcasts to (B, H, Sq, Sk), of q's dtype or float32: added to the scores. Its gradient is summed
            over broadcast dimensions. Or bool: a mask, True where a query sees a key.
        relative_bias: (num_buckets, H), of q's dtype or float32: T5's table, added by the bucket of the distance key
            minus query (`relative_position_bucket`). Its gradient needs O(Sq + Sk) memory.
        relative_bidirectional: half of the buckets are for keys after the query; False: those share bucket 0.
        relative_max_distance: the distance from which on all share a bucket.
        key_lengths: (B,), int32 or int64, on q's device: batch b has the keys j < key_lengths[b], the rest is
            never read. Not checked, as that would wait for the device: below 0 acts as 0, above Sk as Sk.
        segment_ids: (B, Sq), int32 or int64: a query sees the keys of its own id (packed documents).
        key_segment_ids: (B, Sk), of the same dtype; None for segment_ids, if Sq = Sk.
        dropout_p: probability in [0, 1) of dropping a weight; the others are scaled by 1 / (1 - dropout_p).
        dropout_seed: int64, one element, on q's device; the mask is `attention_dropout_mask`. None draws it
            from torch's generator, except on a tape, where it must be given.
        sinks: (H,), of q's dtype or float32: a score without a value that takes part in each head's softmax.
        return_lse: also return the log of the sum of exp(scores), which has a gradient too.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        (B, H, Sq, Dv), of q's dtype, laid out in memory as (B, Sq, H, Dv), so that merging the heads is a
        view. A query that sees no key gives 0 and has gradient 0. Accumulated in float32 (float64 for
        float64). With return_lse, (out, lse): lse (B, H, Sq) in float32 (float64), -inf for such a query.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Vaswani et al. (2017), arXiv:1706.03762; Dao (2023), arXiv:2307.08691; the module's docstring.
    """
    if all(isinstance(t, Tensor) for t in (q, k, v)):
        q, k, v = autocast(q, k, v)
    _check_heads(q, k, v)
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    bias = check_options(
        q, batch, heads, queries, keys, alignment=alignment, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes, bias=bias, relative_bias=relative_bias,
        relative_bidirectional=relative_bidirectional, relative_max_distance=relative_max_distance,
        key_lengths=key_lengths, sinks=sinks,
    )  # fmt: skip
    if segment_ids is None and key_segment_ids is not None:
        raise ValueError("segment_ids: got None with key_segment_ids; allowed: both, or segment_ids alone")
    if segment_ids is not None:
        if key_segment_ids is None:
            if queries != keys:
                raise ValueError(f"key_segment_ids: got None with {queries} queries and {keys} keys; allowed: given")
            key_segment_ids = segment_ids
        check_int("segment_ids", segment_ids, (batch, queries), "one a query")
        check_int("key_segment_ids", key_segment_ids, (batch, keys), "one a key")
        if key_segment_ids.dtype != segment_ids.dtype:
            raise TypeError(f"key_segment_ids: got {key_segment_ids.dtype}; allowed: segment_ids' {segment_ids.dtype}")
    dropout_seed = check_dropout(dropout_p, dropout_seed, q.device, tape)
    check_same_device(
        q=q, k=k, v=v, alibi_slopes=alibi_slopes, bias=bias, relative_bias=relative_bias, key_lengths=key_lengths,
        segment_ids=segment_ids, key_segment_ids=key_segment_ids, dropout_seed=dropout_seed, sinks=sinks,
    )  # fmt: skip
    scale = 1.0 / math.sqrt(width) if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}; allowed: a finite number")
    left, right = band(causal, window)
    out, lse = op(
        q, k, v, bias, relative_bias, sinks, alibi_slopes, key_lengths, segment_ids, key_segment_ids, dropout_seed,
        left, right, alignment == "top-left", scale, float(softcap or 0.0), relative_bidirectional,
        relative_max_distance, float(dropout_p), tape=tape,
    )  # fmt: skip
    return (out, lse) if return_lse else out
