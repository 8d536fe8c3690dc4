"""Attention in Triton, forward: the recurrence of FlashAttention-2. Backward is in attention_backward.py.

One program a tile of BLOCK_M queries of one head. Steps over tiles of keys: interior ones, where every query sees
every key, without a mask; and general ones, at the ends of what is seen and near the diagonal of T5's bias. Tiles that
no query sees are skipped. Maximum, sum and output run in float32; scale * log2(e) is folded into exp2, q and k stay as
given.

Programs are a 1-D grid, in sections of heads whose keys and values fit the L2 cache together, longest tile
first. Reads q once and writes out and lse once; keys and values are read once a tile of queries, mostly from
L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_backward import backward
from .attention_terms import (
    DROPOUT,
    LEFT,
    PACKED,
    RIGHT,
    SHAPED,
    SINKS,
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
from .common import meta

__all__ = ["backward", "compile_cases", "forward", "launch_forward"]


@triton.jit
def _fwd_step(b_q, b_acc, b_sum, b_max, p_k, p_v, i_m, i_n, stride_k, stride_v, b_qi, i_batch, i_head, t, n, here, seed,
              n_rows, n_keys, shift, GENERAL: tl.constexpr, F: tl.constexpr, EVEN_D: tl.constexpr,
              EVEN_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
              BLOCK_DV: tl.constexpr):  # fmt: skip
    """One tile of keys: the new output, sum and maximum of the scores."""
    i_n = tl.multiple_of(tl.to_tensor(i_n), BLOCK_N)
    i, j = i_m + tl.arange(0, BLOCK_M)[:, None], i_n + tl.arange(0, BLOCK_N)[None, :]
    b_k = load_rows(p_k, i_n, stride_k, n_keys, n.d, not GENERAL, EVEN_D, BLOCK_N, BLOCK_D)
    b_s, _ = scores(dot(b_q, tl.trans(b_k)), i, j, i_n < i_m + shift, t, here, shift, n_rows, n_keys, GENERAL, F)
    scale = 1.0 if SHAPED & F else t.scale
    if GENERAL:
        b_kj = ids_of(t.k_ids, t.k_ids_b, i_batch, j, n_keys, F)
        b_s = tl.where(seen(i, j, b_qi, b_kj, t, here, shift, n_rows, n_keys, F), b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    # A row that has seen no key yet: 0 for its maximum, since -inf - -inf would be NaN. A bias may be -inf anywhere.
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new) if GENERAL or (SHAPED & F) else b_new
    b_p = weights(b_s, b_shift[:, None], scale, b_k.dtype == tl.float32)
    b_alpha = tl.exp(b_max - b_shift)
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    if DROPOUT & F:
        b_p = tl.where(kept(seed, i_batch, i_head, i_m, i_n, t.threshold, BLOCK_M, BLOCK_N), b_p, 0.0)
    b_v = load_rows(p_v, i_n, stride_v, n_keys, n.dv, not GENERAL, EVEN_DV, BLOCK_N, BLOCK_DV)
    b_acc = dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None])
    return b_acc, b_sum, b_new


@triton.jit
def _fwd_kernel(q, k, v, out, lse, span, t, n, section, F: tl.constexpr, PARTS: tl.constexpr, EVEN_D: tl.constexpr,
                EVEN_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                BLOCK_DV: tl.constexpr):  # fmt: skip
    tiles = tl.cdiv(n.queries, BLOCK_M)
    i_tile, i_bh = place(tl.program_id(0), tiles, n.batches * n.heads, section)
    i_m = i_tile * BLOCK_M
    i_batch, i_head = (i_bh // n.heads).to(tl.int64), (i_bh % n.heads).to(tl.int64)
    i_q, i_k, n_rows, _, n_keys, shift = sequence(t, n, i_batch, F)
    if PACKED & F:  # noqa: SIM102 - the first is known at compile time
        if i_m >= n_rows:
            return
    here = head_terms(t, i_batch, i_head, F)
    p_k, p_v = at(k, i_batch, i_head // n.group, i_k), at(v, i_batch, i_head // n.group, i_k)
    seed = tl.load(t.seed) if DROPOUT & F else 0
    rows = i_m + tl.arange(0, BLOCK_M)
    b_qi = ids_of(t.q_ids, t.q_ids_b, i_batch, rows[:, None], n_rows, F)

    first, last = i_m + shift, i_m + BLOCK_M - 1 + shift  # positions of the tile's queries
    some, every, every_end, some_end = 0, 0, n_keys, n_keys
    if LEFT & F:
        some, every = tl.maximum(first - t.left, 0), tl.maximum(last - t.left, 0)
    if RIGHT & F:
        every_end = tl.minimum(first + t.right + 1, n_keys)
        some_end = tl.minimum(tl.maximum(last + t.right + 1, 0), n_keys)
    c = cuts(some, every, every_end, some_end, first - t.clip + 1, last + t.clip, span, i_batch, i_tile, tiles, BLOCK_N,
             True, F)  # fmt: skip

    b_q = load_rows(at(q, i_batch, i_head, i_q), i_m, q.row, n_rows, n.d, False, EVEN_D, BLOCK_M, BLOCK_D)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for part in range(PARTS):
        i_inside, i_general, i_end = runs(part, c, PARTS, True)
        for general in tl.static_range(2):
            for i_n in range(i_general if general else i_inside, i_end if general else i_general, BLOCK_N):
                b_acc, b_sum, b_max = _fwd_step(
                    b_q, b_acc, b_sum, b_max, p_k, p_v, i_m, i_n, k.row, v.row, b_qi, i_batch, i_head, t, n, here, seed,
                    n_rows, n_keys, shift, general == 1, F, EVEN_D, EVEN_DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                )  # fmt: skip

    b_kept = tl.full([BLOCK_M], 1.0, tl.float32)  # of the output, beside the sink
    if SINKS & F:
        b_sink = tl.load(t.sinks + i_head)
        b_new = tl.maximum(b_max, b_sink)
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_kept = tl.exp(b_max - b_shift)
        b_sum = b_sum * b_kept + tl.exp(b_sink - b_shift)
        b_max = b_new
    # A query that sees nothing has sum 0: its output is 0, its lse -inf.
    m_blind = b_sum == 0.0
    b_sum = tl.where(m_blind, 1.0, b_sum)
    b_acc = b_acc * (b_kept * t.keep_scale / b_sum)[:, None]
    b_lse = tl.where(m_blind, float("-inf"), b_max + tl.log(b_sum))
    tl.store(at(lse, i_batch, i_head, i_q) + rows, b_lse, mask=rows < n_rows)
    store_rows(at(out, i_batch, i_head, i_q), i_m, out.row, n_rows, n.dv, b_acc, BLOCK_M, BLOCK_DV)


def launch_forward(q, k, v, out, lse, call):
    """Forward of either op; `call` is what `prepare` says of it."""
    t, n, switches = call.terms, call.sizes, call.switches
    if not n.batches * n.queries:
        return
    tile = choose_tile("fwd", q, max(switches["BLOCK_D"], switches["BLOCK_DV"]), n.queries, call.extras)
    span = spans(*call.ids, tile.own)
    heads = heads_in_l2(n.keys, n.d + n.dv, k.element_size(), n.batches * n.heads // n.group)
    _fwd_kernel[(triton.cdiv(n.queries, tile.own) * n.batches * n.heads,)](
        rows_of(q), rows_of(k), rows_of(v), rows_of(out), row_values(lse), span, t, n, n.group * heads,
        F=call.flags, PARTS=call.parts(LEFT.value), BLOCK_M=tile.own, BLOCK_N=tile.step, num_stages=tile.stages,
        num_warps=tile.warps, **switches,
    )  # fmt: skip


def forward(q, k, v, *rest):
    *terms, out, lse = rest
    launch_forward(q, k, v, out, lse, prepare(q, k, v, *terms, None, "forward"))


def compile_cases():
    """What the op's own shapes (head dims 64 and 128, causal or not) do not have: what takes registers, other head dims."""

    def qkv(d, heads=16, key_heads=16):
        shapes = ((4, heads, 2048, d), (4, key_heads, 2048, d), (4, key_heads, 2048, d))
        return dict(zip("qkv", (meta(*s) for s in shapes), strict=True))

    f32, seed = torch.float32, meta(1, dtype=torch.int64)
    table, ids = meta(32, 16, dtype=f32), meta(4, 2048, dtype=torch.int32)
    t5, dropout = {"relative_bias": table}, {"dropout_p": 0.1, "dropout_seed": seed}
    for d in (64, 128):
        yield qkv(d, key_heads=4) | {"causal": True}
        yield qkv(d) | {"bias": meta(1, 16, 2048, 2048)} | dropout
        yield qkv(d) | {"causal": True} | t5 | dropout
    yield qkv(128) | t5
    yield qkv(64) | {"causal": True, "window": (1024, None), "segment_ids": ids, "sinks": meta(16, dtype=f32)}
    yield qkv(128, key_heads=4) | {"causal": True, "softcap": 50.0, "alibi_slopes": meta(16, dtype=f32)}
    yield qkv(64) | {"bias": meta(1, 16, 2048, 2048)} | t5 | dropout
    yield qkv(96, heads=8, key_heads=8) | {"causal": True, "key_lengths": meta(4, dtype=torch.int32)}
    yield qkv(96) | {"bias": meta(1, 1, 2048, 2048)} | t5
    yield qkv(256, heads=8, key_heads=8) | {"causal": True}
