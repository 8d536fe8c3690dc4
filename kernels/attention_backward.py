"""Attention in Triton, backward: dK and dV by tiles of keys, dQ by tiles of queries.

First delta = rowsum(dout * out) - dlse. Then one program a tile of BLOCK_N keys sums dK and dV over all queries of
the group of heads that reads it, and one program a tile of BLOCK_M queries sums dQ over its keys; both
compute P again from lse. Seven products where a fused kernel has five, but no atomics: every sum has one
owner and one order, so that the result is bitwise the same every time. Interior and general steps, and the grid, as in
attention.py. The gradients of bias, relative_bias and sinks are in attention_bias.py; of T5's bias, what lies clip or
farther from the diagonal is summed here, along with dQ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_bias import bias_gradient, relative_gradient, sink_gradient
from .attention_terms import (
    ANY_GENERAL,
    CAP,
    DROPOUT,
    LEFT,
    LENGTHS,
    PACKED,
    RIGHT,
    SHAPED,
    cuts,
    head_terms,
    ids_of,
    prepare,
    runs,
    scores,
    seen,
    sequence,
    spans,
)  # fmt: skip
from .attention_tiles import (
    at,
    choose_tile,
    dot,
    heads_in_l2,
    kept,
    load_rows,
    place,
    row_values,
    rows_of,
    store_rows,
    weights,
)  # fmt: skip
from .common import INTERPRETING

__all__ = ["backward", "launch_backward"]


@triton.jit
def _delta_kernel(dout, dlse, out, delta, heads, n_rows, DV, HAS_DLSE: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_DV: tl.constexpr):  # fmt: skip
    """delta = rowsum(dout * out) - dlse, a float32 number a row."""
    tiles = tl.cdiv(n_rows, BLOCK_M)
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_m = tl.program_id(0) % tiles * BLOCK_M
    i_batch, i_head = i_bh // heads, i_bh % heads
    b_g = load_rows(at(dout, i_batch, i_head, 0), i_m, dout.row, n_rows, DV, False, False, BLOCK_M, BLOCK_DV)
    b_o = load_rows(at(out, i_batch, i_head, 0), i_m, out.row, n_rows, DV, False, False, BLOCK_M, BLOCK_DV)
    rows = i_m + tl.arange(0, BLOCK_M)
    b_delta = tl.sum(b_g.to(tl.float32) * b_o.to(tl.float32), 1)
    if HAS_DLSE:
        b_delta -= tl.load(at(dlse, i_batch, i_head, 0) + rows * dlse.row, mask=rows < n_rows, other=0.0)
    tl.store(at(delta, i_batch, i_head, 0) + rows, b_delta, mask=rows < n_rows)


@triton.jit
def _load_lse(p_lse, rows, n_rows):
    """lse, +inf where there is no query or it sees nothing: so that P = 0."""
    b_lse = tl.load(p_lse + rows, mask=rows < n_rows, other=float("inf"))
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse)


@triton.jit
def _dkdv_step(b_dk, b_dv, b_k, b_v, p_q, p_g, p_lse, p_delta, i_m, i_n, stride_q, stride_g, b_kj, i_batch, i_head, t, n,
               here, seed, n_rows, n_keys, shift, GENERAL: tl.constexpr, F: tl.constexpr, WANT_DK: tl.constexpr,
               WANT_DV: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """One tile of queries: dV += (P * M')^T dO, dK += dX^T Q, with the scores transposed."""
    i_m = tl.multiple_of(tl.to_tensor(i_m), BLOCK_M)
    rows = i_m + tl.arange(0, BLOCK_M)
    i, j = rows[None, :], i_n + tl.arange(0, BLOCK_N)[:, None]
    b_q = load_rows(p_q, i_m, stride_q, n_rows, n.d, False, EVEN_D, BLOCK_M, BLOCK_D)
    b_lse = _load_lse(p_lse, rows, n_rows)
    b_s, b_slope = scores(
        dot(b_k, tl.trans(b_q)), i, j, i_n < i_m + shift, t, here, shift, n_rows, n_keys, GENERAL, F
    )  # [BLOCK_N, BLOCK_M]
    b_p = weights(b_s, b_lse[None, :], 1.0 if SHAPED & F else t.scale, b_k.dtype == tl.float32)
    if GENERAL:  # P and not S: exp of a score that lse does not count may overflow
        b_qi = ids_of(t.q_ids, t.q_ids_b, i_batch, i, n_rows, F)
        b_p = tl.where(seen(i, j, b_qi, b_kj, t, here, shift, n_rows, n_keys, F), b_p, 0.0)
    if DROPOUT & F:
        m_kept = tl.trans(kept(seed, i_batch, i_head, i_m, i_n, t.threshold, BLOCK_M, BLOCK_N))
    b_g = load_rows(p_g, i_m, stride_g, n_rows, n.dv, False, EVEN_DV, BLOCK_M, BLOCK_DV)
    if WANT_DV:
        b_pm = tl.where(m_kept, b_p * t.keep_scale, 0.0) if DROPOUT & F else b_p
        b_dv = dot(b_pm.to(b_g.dtype), b_g, b_dv)
    if WANT_DK:
        b_dp = dot(b_v, tl.trans(b_g))  # [BLOCK_N, BLOCK_M]
        if DROPOUT & F:
            b_dp = tl.where(m_kept, b_dp * t.keep_scale, 0.0)
        b_delta = tl.load(p_delta + rows, mask=rows < n_rows, other=0.0)
        b_ds = b_p * (b_dp - b_delta[None, :])
        if CAP & F:
            b_ds = b_ds * b_slope
        b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk)
    return b_dk, b_dv


@triton.jit
def _dkdv_kernel(q, k, v, dout, lse, delta, dk, dv, span, t, n, section, F: tl.constexpr, PARTS: tl.constexpr,
                 GROUPED: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, EVEN_D: tl.constexpr,
                 EVEN_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                 BLOCK_DV: tl.constexpr):  # fmt: skip
    # Programs go from the last tile on, and here the first keys, which the most queries see, are to go first.
    tiles = tl.cdiv(n.keys, BLOCK_N)
    key_heads = n.heads // n.group
    i_tile, i_bh = place(tl.program_id(0), tiles, n.batches * key_heads, section)
    i_tile = tiles - 1 - i_tile
    i_n = i_tile * BLOCK_N
    i_batch, i_hk = (i_bh // key_heads).to(tl.int64), (i_bh % key_heads).to(tl.int64)
    i_q, i_k, n_rows, n_own, n_keys, shift = sequence(t, n, i_batch, F)
    if PACKED & F:  # noqa: SIM102 - the first is known at compile time
        if i_n >= n_own:
            return
    seed = tl.load(t.seed) if DROPOUT & F else 0
    b_k = load_rows(at(k, i_batch, i_hk, i_k), i_n, k.row, n_keys, n.d, False, EVEN_D, BLOCK_N, BLOCK_D)
    b_v = load_rows(at(v, i_batch, i_hk, i_k), i_n, v.row, n_keys, n.dv, False, EVEN_DV, BLOCK_N, BLOCK_DV)
    b_kj = ids_of(t.k_ids, t.k_ids_b, i_batch, i_n + tl.arange(0, BLOCK_N)[:, None], n_keys, F)

    # Queries from which on some key of the tile is seen, and every key is. Rows beyond the last do no harm.
    first, last = i_n - shift, i_n + BLOCK_N - 1 - shift
    some, every, some_end = 0, 0, n_rows
    every_end = tl.cdiv(n_rows, BLOCK_M) * BLOCK_M
    if RIGHT & F:
        some, every = tl.maximum(first - t.right, 0), tl.maximum(last - t.right, 0)
    if LEFT & F:
        every_end = tl.minimum(first + t.left + 1, every_end)
        some_end = tl.minimum(tl.maximum(last + t.left + 1, 0), n_rows)
    some_end = tl.where(i_n < n_keys, some_end, 0)
    every_end = tl.where(i_n < n_keys, every_end, 0)
    c = cuts(some, every, every_end, some_end, first - t.clip + 1, last + t.clip, span, i_batch, i_tile, tiles, BLOCK_M,
             False, F)  # fmt: skip

    # A key beyond n_keys has a row of its own in dk and dv: what is summed there is thrown away at the end.
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for part in range(PARTS):
        i_general, i_inside, i_end = runs(part, c, PARTS, False)
        # Where every query sees every key there are interior steps only.
        for interior in tl.static_range(0 if ANY_GENERAL & F else 1, 2):
            i_from, i_to = i_inside if interior else i_general, i_end if interior else i_inside
            if GROUPED:  # one loop over the steps of all heads of the group: a loop in a loop takes registers
                a_head = tl.cdiv(tl.maximum(i_to - i_from, 0), BLOCK_M) * BLOCK_M
                i_to = i_from + a_head * n.group
            for i_step in range(i_from, i_to, BLOCK_M):
                i_head, i_m = i_hk, i_step
                if GROUPED:
                    i_head = i_hk * n.group + (i_step - i_from) // a_head
                    i_m = i_from + (i_step - i_from) % a_head
                here = head_terms(t, i_batch, i_head, F)
                p_q, p_g = at(q, i_batch, i_head, i_q), at(dout, i_batch, i_head, i_q)
                p_lse, p_delta = at(lse, i_batch, i_head, i_q), at(delta, i_batch, i_head, i_q)
                b_dk, b_dv = _dkdv_step(
                    b_dk, b_dv, b_k, b_v, p_q, p_g, p_lse, p_delta, i_m, i_n, q.row, dout.row, b_kj, i_batch, i_head,
                    t, n, here, seed, n_rows, n_keys, shift, interior == 0, F, WANT_DK, WANT_DV, EVEN_D, EVEN_DV,
                    BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                )  # fmt: skip

    m_key = (i_n + tl.arange(0, BLOCK_N) < n_keys)[:, None]
    if WANT_DK:
        b_dk = tl.where(m_key, b_dk * t.scale, 0.0)
        store_rows(at(dk, i_batch, i_hk, i_k), i_n, dk.row, n_own, n.d, b_dk, BLOCK_N, BLOCK_D)
    if WANT_DV:
        b_dv = tl.where(m_key, b_dv, 0.0)
        store_rows(at(dv, i_batch, i_hk, i_k), i_n, dv.row, n_own, n.dv, b_dv, BLOCK_N, BLOCK_DV)


@triton.jit
def _dq_step(b_dq, b_low, b_high, b_q, b_g, b_lse, b_delta, p_k, p_v, i_m, i_n, stride_k, stride_v, b_qi, i_batch, i_head,
             t, n, here, seed, n_rows, n_keys, shift, GENERAL: tl.constexpr, F: tl.constexpr, FAR: tl.constexpr,
             EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """One tile of keys: dQ += dX K. FAR: also the sums of dS over keys clip or farther before and after."""
    i_n = tl.multiple_of(tl.to_tensor(i_n), BLOCK_N)
    i, j = i_m + tl.arange(0, BLOCK_M)[:, None], i_n + tl.arange(0, BLOCK_N)[None, :]
    b_k = load_rows(p_k, i_n, stride_k, n_keys, n.d, not GENERAL, EVEN_D, BLOCK_N, BLOCK_D)
    before = i_n < i_m + shift
    b_s, b_slope = scores(dot(b_q, tl.trans(b_k)), i, j, before, t, here, shift, n_rows, n_keys, GENERAL, F)
    b_p = weights(b_s, b_lse[:, None], 1.0 if SHAPED & F else t.scale, b_k.dtype == tl.float32)
    if GENERAL:
        b_kj = ids_of(t.k_ids, t.k_ids_b, i_batch, j, n_keys, F)
        b_p = tl.where(seen(i, j, b_qi, b_kj, t, here, shift, n_rows, n_keys, F), b_p, 0.0)
    b_v = load_rows(p_v, i_n, stride_v, n_keys, n.dv, not GENERAL, EVEN_DV, BLOCK_N, BLOCK_DV)
    b_dp = dot(b_g, tl.trans(b_v))  # [BLOCK_M, BLOCK_N]
    if DROPOUT & F:
        m_kept = kept(seed, i_batch, i_head, i_m, i_n, t.threshold, BLOCK_M, BLOCK_N)
        b_dp = tl.where(m_kept, b_dp * t.keep_scale, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    if FAR:
        if GENERAL:
            b_d = j - i - shift
            b_low += tl.sum(tl.where(b_d <= -t.clip, b_ds, 0.0), 1)
            b_high += tl.sum(tl.where(b_d >= t.clip, b_ds, 0.0), 1)
        else:
            b_row = tl.sum(b_ds, 1)
            b_low += tl.where(before, b_row, 0.0)
            b_high += tl.where(before, 0.0, b_row)
    if CAP & F:
        b_ds = b_ds * b_slope
    return dot(b_ds.to(b_k.dtype), b_k, b_dq), b_low, b_high


@triton.jit
def _dq_kernel(q, k, v, dout, lse, delta, dq, far, span, t, n, section, F: tl.constexpr, PARTS: tl.constexpr,
               FAR: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    tiles = tl.cdiv(n.queries, BLOCK_M)
    i_tile, i_bh = place(tl.program_id(0), tiles, n.batches * n.heads, section)
    i_m = i_tile * BLOCK_M
    i_batch, i_head = (i_bh // n.heads).to(tl.int64), (i_bh % n.heads).to(tl.int64)
    i_q, i_k, n_rows, _, n_keys, shift = sequence(t, n, i_batch, F)
    p_far = far + (i_bh.to(tl.int64) * tiles + i_tile) * 2 if FAR else 0
    if PACKED & F:  # noqa: SIM102 - the first is known at compile time
        if i_m >= n_rows:
            if FAR:
                tl.store(p_far, 0.0)
                tl.store(p_far + 1, 0.0)
            return
    here = head_terms(t, i_batch, i_head, F)
    p_k, p_v = at(k, i_batch, i_head // n.group, i_k), at(v, i_batch, i_head // n.group, i_k)
    seed = tl.load(t.seed) if DROPOUT & F else 0
    rows = i_m + tl.arange(0, BLOCK_M)
    b_qi = ids_of(t.q_ids, t.q_ids_b, i_batch, rows[:, None], n_rows, F)

    first, last = i_m + shift, i_m + BLOCK_M - 1 + shift
    some, every, every_end, some_end = 0, 0, n_keys, n_keys
    if LEFT & F:
        some, every = tl.maximum(first - t.left, 0), tl.maximum(last - t.left, 0)
    if RIGHT & F:
        every_end = tl.minimum(first + t.right + 1, n_keys)
        some_end = tl.minimum(tl.maximum(last + t.right + 1, 0), n_keys)
    c = cuts(some, every, every_end, some_end, first - t.clip + 1, last + t.clip, span, i_batch, i_tile, tiles, BLOCK_N,
             True, F)  # fmt: skip

    b_q = load_rows(at(q, i_batch, i_head, i_q), i_m, q.row, n_rows, n.d, False, EVEN_D, BLOCK_M, BLOCK_D)
    b_g = load_rows(at(dout, i_batch, i_head, i_q), i_m, dout.row, n_rows, n.dv, False, EVEN_DV, BLOCK_M, BLOCK_DV)
    b_lse = _load_lse(at(lse, i_batch, i_head, i_q), rows, n_rows)
    b_delta = tl.load(at(delta, i_batch, i_head, i_q) + rows, mask=rows < n_rows, other=0.0)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_low = tl.zeros([BLOCK_M], tl.float32)
    b_high = tl.zeros([BLOCK_M], tl.float32)
    for part in range(PARTS):
        i_inside, i_general, i_end = runs(part, c, PARTS, True)
        for general in tl.static_range(2):
            for i_n in range(i_general if general else i_inside, i_end if general else i_general, BLOCK_N):
                b_dq, b_low, b_high = _dq_step(
                    b_dq, b_low, b_high, b_q, b_g, b_lse, b_delta, p_k, p_v, i_m, i_n, k.row, v.row, b_qi, i_batch,
                    i_head, t, n, here, seed, n_rows, n_keys, shift, general == 1, F, FAR, EVEN_D, EVEN_DV, BLOCK_M,
                    BLOCK_N, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
    if FAR:
        tl.store(p_far, tl.sum(b_low, 0))
        tl.store(p_far + 1, tl.sum(b_high, 0))
    store_rows(at(dq, i_batch, i_head, i_q), i_m, dq.row, n_rows, n.d, b_dq * t.scale, BLOCK_M, BLOCK_D)


def _launch_delta(dout, dlse, out, lse, block_dv):
    delta = torch.empty_like(lse)
    packed = out.dim() == 3
    batches, heads, n_rows = (1, *lse.shape) if packed else lse.shape
    rows = 16 if INTERPRETING.value else 64 if block_dv <= 128 else 32
    _delta_kernel[(triton.cdiv(n_rows, rows) * batches * heads,)](
        rows_of(dout), row_values(dlse), rows_of(out), row_values(delta), heads, n_rows, out.shape[-1],
        HAS_DLSE=dlse is not None, BLOCK_M=rows, BLOCK_DV=block_dv,
    )  # fmt: skip
    return delta


def launch_backward(dout, dlse, q, k, v, out, lse, call, dq, dk, dv, d_bias, d_relative_bias, d_sinks):
    """Backward of either op; `call` is what `prepare` says of it. Gradients not wanted are None."""
    t, n, flags, switches = call.terms, call.sizes, call.flags, call.switches
    width = max(switches["BLOCK_D"], switches["BLOCK_DV"])
    if dout is None:
        dout = torch.zeros_like(out)
    delta = _launch_delta(dout, dlse, out, lse, switches["BLOCK_DV"]) if lse.numel() else lse
    inputs = tuple(map(rows_of, (q, k, v, dout))) + tuple(map(row_values, (lse, delta)))
    key_heads, size = n.heads // n.group, q.element_size()
    if (dk is not None or dv is not None) and n.batches * n.keys:
        # These take registers as well, though fewer than one of `extras` each.
        parts = call.parts(LEFT.value)
        uneven = not (switches["EVEN_D"] and switches["EVEN_DV"]) or bool(flags & (PACKED.value | LENGTHS.value))
        grouped = (n.group > 1) * ((width > 64) + (parts > 1))
        extras = call.extras + max(uneven, grouped)
        tile = choose_tile("dkdv", k, width, n.keys, extras)
        heads = heads_in_l2(n.queries, n.d + n.dv, size, n.batches * n.heads)
        _dkdv_kernel[(triton.cdiv(n.keys, tile.own) * n.batches * key_heads,)](
            *inputs, rows_of(dk), rows_of(dv), spans(*call.ids[::-1], tile.own), t, n, max(1, heads // n.group),
            F=flags, PARTS=parts, GROUPED=n.group > 1, WANT_DK=dk is not None, WANT_DV=dv is not None,
            BLOCK_M=tile.step, BLOCK_N=tile.own, num_stages=tile.stages, num_warps=tile.warps, **switches,
        )  # fmt: skip
    far = None
    if (dq is not None or d_relative_bias is not None) and lse.numel():
        tile = choose_tile("dq", q, width, n.queries, call.extras)
        tiles = triton.cdiv(n.queries, tile.own)
        heads = heads_in_l2(n.keys, n.d + n.dv, size, n.batches * key_heads)
        if d_relative_bias is not None:
            far = torch.empty((n.batches, n.heads, tiles, 2), dtype=torch.float32, device=q.device)
        _dq_kernel[(tiles * n.batches * n.heads,)](
            *inputs, rows_of(torch.empty_like(q) if dq is None else dq), far, spans(*call.ids, tile.own), t, n,
            n.group * heads, F=flags, PARTS=call.parts(LEFT.value), FAR=far is not None, BLOCK_M=tile.own,
            BLOCK_N=tile.step, num_stages=tile.stages, num_warps=tile.warps, **switches,
        )  # fmt: skip
    if d_bias is not None:
        bias_gradient(inputs, call, d_bias, size, width)
    if d_relative_bias is not None and far is not None:
        relative_gradient(inputs, call, far, d_relative_bias, size, width)
    if d_sinks is not None and lse.numel():
        sink_gradient(lse, delta, t.sinks, d_sinks)


def backward(dout, dlse, q, k, v, *rest):
    *terms, dq, dk, dv, d_bias, d_relative_bias, d_sinks = rest
    out, lse = terms[8:10]
    call = prepare(q, k, v, *terms[:8], *terms[10:], None, "backward")
    launch_backward(dout, dlse, q, k, v, out, lse, call, dq, dk, dv, d_bias, d_relative_bias, d_sinks)
