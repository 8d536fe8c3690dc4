"""Gradients of what attention adds to its scores, in Triton: bias, T5's relative bias, sinks. No atomics.

bias: one program a tile of the bias itself, which goes through all batches, heads, queries or keys that share it.

relative_bias: dS only matters by the distance d = j - i. What is clip or farther from the diagonal comes as two sums a
tile of queries from the kernel of dQ. For the rest, one program a head and band of N diagonals goes along the
band in N x N tiles: rotating row r of a tile by r columns puts diagonals into columns, those that wrap around apart.
Adding up the diagonals of a bucket is left to PyTorch, a sum without atomics as well. All that is stored is
O(Sq + Sk) numbers a head.

sinks: one program a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_terms import DROPOUT, MASK, SHAPED, Call, head_terms, ids_of, scores, seen, sequence
from .attention_tiles import at, dot, kept, kept_at, load_rows, reads_shared, row_values, weights
from .common import INTERPRETING

__all__ = ["bias_gradient", "relative_gradient", "sink_gradient"]


@triton.jit
def _d_scores(q, k, v, dout, lse, delta, i_m, i_n, i_batch, i_head, t, n, F: tl.constexpr, EVEN_D: tl.constexpr,
              EVEN_DV: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """dS of a tile, [BLOCK_M, BLOCK_N], 0 where nothing is seen. Keys begin at any i_n, also before 0, if not ALIGNED."""
    i_q, i_k, n_rows, _, n_keys, shift = sequence(t, n, i_batch, F)
    here = head_terms(t, i_batch, i_head, F)
    rows, cols = i_m + tl.arange(0, BLOCK_M), i_n + tl.arange(0, BLOCK_N)
    i, j = rows[:, None], cols[None, :]
    b_q = load_rows(at(q, i_batch, i_head, i_q), i_m, q.row, n_rows, n.d, False, EVEN_D, BLOCK_M, BLOCK_D)
    b_g = load_rows(at(dout, i_batch, i_head, i_q), i_m, dout.row, n_rows, n.dv, False, EVEN_DV, BLOCK_M, BLOCK_DV)
    p_k, p_v = at(k, i_batch, i_head // n.group, i_k), at(v, i_batch, i_head // n.group, i_k)
    m_key = (cols >= 0) & (cols < n_keys)
    c, cv = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    b_k = tl.load(p_k + cols.to(tl.int64)[:, None] * k.row + c, mask=m_key[:, None] & (c < n.d), other=0.0)
    b_v = tl.load(p_v + cols.to(tl.int64)[:, None] * v.row + cv, mask=m_key[:, None] & (cv < n.dv), other=0.0)
    b_s, _ = scores(dot(b_q, tl.trans(b_k)), i, j, False, t, here, shift, n_rows, n_keys, True, F)
    b_lse = tl.load(at(lse, i_batch, i_head, i_q) + rows, mask=rows < n_rows, other=float("inf"))
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    b_delta = tl.load(at(delta, i_batch, i_head, i_q) + rows, mask=rows < n_rows, other=0.0)
    b_p = weights(b_s, b_lse[:, None], 1.0 if SHAPED & F else t.scale, b_k.dtype == tl.float32)
    b_qi = ids_of(t.q_ids, t.q_ids_b, i_batch, i, n_rows, F)
    b_kj = ids_of(t.k_ids, t.k_ids_b, i_batch, tl.maximum(j, 0), n_keys, F)
    m_seen = m_key[None, :] & seen(i, tl.maximum(j, 0) if MASK & F else j, b_qi, b_kj, t, here, shift, n_rows, n_keys, F)
    b_dp = dot(b_g, tl.trans(b_v))
    if DROPOUT & F:
        if ALIGNED:
            m_kept = kept(tl.load(t.seed), i_batch, i_head, i_m, i_n, t.threshold, BLOCK_M, BLOCK_N)
        else:
            m_kept = kept_at(tl.load(t.seed), i_batch, i_head, i, tl.maximum(j, 0), t.threshold)
        b_dp = tl.where(m_kept, b_dp * t.keep_scale, 0.0)
    return tl.where(m_seen, b_p * (b_dp - b_delta[:, None]), 0.0)


@triton.jit
def _dbias_kernel(q, k, v, dout, lse, delta, d_bias, n_b, n_h, n_i, n_j, own_b, own_h, own_i, own_j, t, n,
                  F: tl.constexpr, EVEN_D: tl.constexpr, EVEN_DV: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """d_bias is (own_b, own_h, own_i, own_j), contiguous; n_: how many batches, heads and tiles share an element."""
    tiles_i, tiles_j = tl.cdiv(own_i, BLOCK_M), tl.cdiv(own_j, BLOCK_N)
    i_program = tl.program_id(0)
    i_tile, i_rest = i_program // tiles_j % tiles_i, i_program // tiles_j // tiles_i
    j_tile = i_program % tiles_j
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(n_b * n_h * n_i * n_j):
        i_batch = (i_rest // own_h + step // (n_j * n_i * n_h)).to(tl.int64)
        i_head = (i_rest % own_h + step // (n_j * n_i) % n_h).to(tl.int64)
        i_m = (i_tile + step // n_j % n_i) * BLOCK_M
        i_n = (j_tile + step % n_j) * BLOCK_N
        b_sum += _d_scores(q, k, v, dout, lse, delta, i_m, i_n, i_batch, i_head, t, n, F, EVEN_D, EVEN_DV, True, BLOCK_M,
                           BLOCK_N, BLOCK_D, BLOCK_DV)  # fmt: skip
    rows, cols = i_tile * BLOCK_M + tl.arange(0, BLOCK_M), j_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    p_own = d_bias + i_rest.to(tl.int64) * own_i * own_j
    d_type = d_bias.dtype.element_ty
    if n_i > 1 or own_i == 1:
        b_row = tl.sum(b_sum, 0)
        if n_j > 1 or own_j == 1:
            tl.store(p_own, tl.sum(b_row, 0).to(d_type))
        else:
            tl.store(p_own + cols, b_row.to(d_type), mask=cols < own_j)
    else:
        p_rows = p_own + rows.to(tl.int64) * own_j
        if n_j > 1 or own_j == 1:
            tl.store(p_rows, tl.sum(b_sum, 1).to(d_type), mask=rows < own_i)
        else:
            m = (rows < own_i)[:, None] & (cols < own_j)[None, :]
            tl.store(p_rows[:, None] + cols[None, :], b_sum.to(d_type), mask=m)


@triton.jit
def _near_kernel(q, k, v, dout, lse, delta, partial, bands, t, n, F: tl.constexpr, EVEN_D: tl.constexpr,
                 EVEN_DV: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
                 BLOCK_DV: tl.constexpr):  # fmt: skip
    """dS by diagonals less than clip away: partial (batches, heads, bands, 2, BLOCK), float32.

    Band b begins at the distance o = (b - bands // 2) * BLOCK; its first row has the diagonals from o on, its second
    those from o - BLOCK on.
    """
    i_band, i_bh = tl.program_id(0) % bands, (tl.program_id(0) // bands).to(tl.int64)
    i_batch, i_head = i_bh // n.heads, i_bh % n.heads
    _, _, n_rows, _, n_keys, shift = sequence(t, n, i_batch, F)
    offset = (i_band - bands // 2) * BLOCK
    r, c = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    near = tl.abs(offset + c - r) < t.clip
    b_upper = tl.zeros([BLOCK], tl.float32)
    b_lower = tl.zeros([BLOCK], tl.float32)
    # Queries whose keys i + shift + offset - BLOCK < j < i + shift + offset + BLOCK are not all outside.
    i_first = tl.maximum(-shift - offset - BLOCK, 0) // BLOCK * BLOCK
    i_last = tl.minimum(tl.maximum(n_keys - shift - offset + BLOCK, 0), n_rows)
    for i in range(i_first, i_last, BLOCK):
        i_m = tl.to_tensor(i)
        b_ds = _d_scores(q, k, v, dout, lse, delta, i_m, i_m + shift + offset, i_batch, i_head, t, n, F, EVEN_D, EVEN_DV,
                         False, BLOCK, BLOCK, BLOCK_D, BLOCK_DV)  # fmt: skip
        b_ds = tl.gather(tl.where(near, b_ds, 0.0), (c + r) % BLOCK, 1)
        b_upper += tl.sum(tl.where(c + r < BLOCK, b_ds, 0.0), 0)
        b_lower += tl.sum(tl.where(c + r < BLOCK, 0.0, b_ds), 0)
    p_own = partial + (i_bh * bands + i_band) * 2 * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_own, b_upper)
    tl.store(p_own + BLOCK, b_lower)


@triton.jit
def _sink_kernel(lse, delta, sinks, d_sinks, stride, batches, n_rows, BLOCK: tl.constexpr):
    """d_sinks[head] -= sum over queries of exp(sink - lse) delta."""
    i_head = tl.program_id(0).to(tl.int64)
    b_sink = tl.load(sinks + i_head)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_batch in range(batches):
        for i in range(0, n_rows, BLOCK):
            rows = i + tl.arange(0, BLOCK)
            b_lse = tl.load(at(lse, i_batch, i_head, 0) + rows, mask=rows < n_rows, other=float("-inf"))
            b_delta = tl.load(at(delta, i_batch, i_head, 0) + rows, mask=rows < n_rows, other=0.0)
            b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
            b_sum += tl.exp(b_sink - b_lse) * b_delta
    p_own = d_sinks + i_head * stride
    tl.store(p_own, tl.load(p_own) - tl.sum(b_sum, 0))


def _tile(size: int, width: int, device: torch.device) -> int:
    """Rows and columns of a square tile: four operands of it are held at a time."""
    if INTERPRETING.value:
        return 32
    if size == 2 and width <= 128 and reads_shared(device):
        return 64
    return 32 if width <= 128 else 16


def bias_gradient(inputs: tuple, call: Call, d_bias: torch.Tensor, size: int, width: int) -> None:
    """Write d_bias (batches or 1, heads or 1, queries or 1, keys or 1), contiguous."""
    n, own, block = call.sizes, d_bias.shape, _tile(size, width, d_bias.device)
    if not d_bias.numel():
        return
    full = (n.batches, n.heads, triton.cdiv(n.queries, block), triton.cdiv(n.keys, block))
    shared = [m if o == 1 else 1 for m, o in zip(full, own, strict=True)]
    tiles = own[0] * own[1] * triton.cdiv(own[2], block) * triton.cdiv(own[3], block)
    _dbias_kernel[(tiles,)](
        *inputs, d_bias, *shared, *own, call.terms, n, F=call.flags, BLOCK_M=block, BLOCK_N=block, num_stages=1,
        num_warps=8, **call.switches,
    )  # fmt: skip


def relative_gradient(
    inputs: tuple, call: Call, far: torch.Tensor, d_table: torch.Tensor, size: int, width: int
) -> None:
    """Add to d_table (buckets, heads). far: (batches, heads, tiles, 2), from the kernel of dQ."""
    t, n, block = call.terms, call.sizes, _tile(size, width, far.device)
    assert call.buckets is not None
    bands = 2 * triton.cdiv(t.clip, block) + 1
    partial = torch.empty((n.batches, n.heads, bands, 2, block), dtype=torch.float32, device=far.device)
    _near_kernel[(bands * n.batches * n.heads,)](
        *inputs, partial, bands, t, n, F=call.flags, BLOCK=block, num_stages=1, num_warps=8,
        **call.switches,
    )  # fmt: skip
    place = torch.arange(partial[0, 0].numel(), device=far.device)
    half = place // block
    distance = (half // 2 - bands // 2 - half % 2) * block + place % block
    bucket = call.buckets[distance.clamp(-t.clip, t.clip) + t.clip]
    sums = partial.sum(0).flatten(1)  # (heads, places)
    sums, bucket = torch.cat((sums, far.sum((0, 2))), 1), torch.cat((bucket, call.buckets[:1], call.buckets[-1:]))
    here = bucket[:, None] == torch.arange(d_table.shape[0], device=far.device)  # (places, buckets)
    d_table.add_(torch.where(here, sums[:, :, None], 0.0).sum(1).t())


def sink_gradient(lse: torch.Tensor, delta: torch.Tensor, sinks: torch.Tensor, d_sinks: torch.Tensor) -> None:
    """Add to d_sinks (heads,)."""
    packed = lse.dim() == 2
    batches, heads, n_rows = (1, *lse.shape) if packed else lse.shape
    _sink_kernel[(heads,)](
        row_values(lse), row_values(delta), sinks, d_sinks, d_sinks.stride(0), batches, n_rows,
        BLOCK=64 if INTERPRETING.value else 1024,
    )  # fmt: skip
