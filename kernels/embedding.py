"""Token, position and segment embedding in Triton.

Forward: one program a tile of tokens and columns. A bad id reads nothing and gives NaN.

Backward: the ids are sorted on the device, stably, so that the tokens of one id are a run, in their order.
Blocks of about sqrt(T) sorted tokens are summed token by token; a run that lies within its block is added to
the gradient at once, one that crosses into another leaves its part in `head` (of a block it entered) or
`tail` (of the block it began in). A second kernel lets the block where such a run began add the parts in
order. So each element of the gradient is written by one program in each launch, the order of every sum is
fixed, and even one id in all places takes only about 2 sqrt(T) steps. No atomics, no data-dependent sizes.

Positions 0, 1, 2, ... need no sorting: their gradient is the sum over sequences.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .common import meta
from .layer_norm import add_partial_rows

__all__ = ["add_rows", "add_table_gradients", "backward", "compile_cases", "forward", "table_arguments"]


@triton.jit
def gather(table, i_row, i_col, m, V, H):
    """Rows of a table in float32, for tiles or scalars of rows; NaN for a row that it has not."""
    m_good = (i_row >= 0) & (i_row < V)
    b_rows = tl.load(table + i_row * H + i_col, mask=m & m_good, other=0.0)
    return tl.where(m_good, b_rows.to(tl.float32), float("nan"))


@triton.jit
def add_rows(ids, weight, positions, position_weight, segments, segment_weight, i_t, i_col, m_t, m_col, S, V, P, G, H,
             HAS_POSITION: tl.constexpr, GIVEN: tl.constexpr, HAS_SEGMENT: tl.constexpr,
             SEGMENTED: tl.constexpr):  # fmt: skip
    """The sum of token i_t's rows, a tile of columns. Tokens may be [M, 1] beside columns [1, N], or a scalar."""
    m = m_t & m_col
    i_id = tl.load(ids + i_t, mask=m_t, other=0).to(tl.int64)
    b_y = gather(weight, i_id, i_col, m, V, H)
    if HAS_POSITION:
        if GIVEN:
            i_p = tl.load(positions + i_t, mask=m_t, other=0).to(tl.int64)
        else:
            i_p = i_t % S
        b_y += gather(position_weight, i_p, i_col, m, P, H)
    if HAS_SEGMENT:
        if SEGMENTED:
            i_g = tl.load(segments + i_t, mask=m_t, other=0).to(tl.int64)
            b_y += gather(segment_weight, i_g, i_col, m, G, H)
        else:
            b_y += tl.load(segment_weight + i_col, mask=m_col, other=0.0).to(tl.float32)
    return b_y


@triton.jit
def _fwd_kernel(ids, weight, positions, position_weight, segments, segment_weight, y, T, S, V, P, G, H,
                HAS_POSITION: tl.constexpr, GIVEN: tl.constexpr, HAS_SEGMENT: tl.constexpr,
                SEGMENTED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    col_tiles = tl.cdiv(H, BLOCK_N)
    i_t = (tl.program_id(0) // col_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    i_col = tl.program_id(0) % col_tiles * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    m_t = i_t < T
    m_col = i_col < H
    b_y = add_rows(ids, weight, positions, position_weight, segments, segment_weight, i_t, i_col, m_t, m_col, S, V, P,
                   G, H, HAS_POSITION, GIVEN, HAS_SEGMENT, SEGMENTED)  # fmt: skip
    tl.store(y + i_t * H + i_col, b_y.to(y.dtype.element_ty), mask=m_t & m_col)


@triton.jit
def _bwd_kernel(dy, ids, order, total, head, tail, T, V, H, padding, BLOCK_T, BLOCK_N: tl.constexpr):
    col_tiles = tl.cdiv(H, BLOCK_N)
    i_block = (tl.program_id(0) // col_tiles).to(tl.int64)
    i_col = tl.program_id(0) % col_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_col = i_col < H
    i_first = i_block * BLOCK_T
    i_end = tl.minimum(i_first + BLOCK_T, T)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    i_id = tl.load(ids + i_first).to(tl.int64)
    # whether the run at hand began before this block, and whether it goes on behind the token at hand
    entered = (i_first > 0) & (tl.load(ids + i_first - 1, mask=i_first > 0, other=0) == i_id)
    open = entered
    for i in range(i_first, i_end):
        i_token = tl.load(order + i)
        b_sum += tl.load(dy + i_token * H + i_col, mask=m_col, other=0.0).to(tl.float32)
        i_next = tl.load(ids + i + 1, mask=i + 1 < T, other=0).to(tl.int64)
        open = (i + 1 < T) & (i_next == i_id)
        tl.store(head + i_block * H + i_col, b_sum, mask=m_col & entered & ~open)
        m_add = m_col & ~entered & ~open & (i_id >= 0) & (i_id < V) & (i_id != padding)
        b_old = tl.load(total + i_id * H + i_col, mask=m_add, other=0.0).to(tl.float32)
        tl.store(total + i_id * H + i_col, (b_old + b_sum).to(total.dtype.element_ty), mask=m_add)
        b_sum = tl.where(open, b_sum, 0.0)
        entered = entered & open
        i_id = i_next
    tl.store(head + i_block * H + i_col, b_sum, mask=m_col & entered & open)
    tl.store(tail + i_block * H + i_col, b_sum, mask=m_col & ~entered & open)


@triton.jit
def _join_kernel(ids, run_end, total, head, tail, V, H, padding, BLOCK_T, BLOCK_N: tl.constexpr):
    """Adds up the run that begins in a block and goes on behind it, if there is one."""
    col_tiles = tl.cdiv(H, BLOCK_N)
    i_block = (tl.program_id(0) // col_tiles).to(tl.int64)
    i_col = tl.program_id(0) % col_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_col = i_col < H
    i_first = i_block * BLOCK_T
    i_id = tl.load(ids + i_first + BLOCK_T - 1).to(tl.int64)
    began = (i_first == 0) | (tl.load(ids + i_first - 1, mask=i_first > 0, other=0) != i_id)
    i_last = (tl.load(run_end + i_block) - 1) // BLOCK_T  # the block in which the run ends
    if began & (i_last > i_block) & (i_id >= 0) & (i_id < V) & (i_id != padding):
        b_sum = tl.load(tail + i_block * H + i_col, mask=m_col, other=0.0)
        for i in range(i_block + 1, i_last + 1):
            b_sum += tl.load(head + i * H + i_col, mask=m_col, other=0.0)
        b_old = tl.load(total + i_id * H + i_col, mask=m_col, other=0.0).to(tl.float32)
        tl.store(total + i_id * H + i_col, (b_old + b_sum).to(total.dtype.element_ty), mask=m_col)


def _columns(h: int) -> int:
    return min(triton.next_power_of_2(h), 256)


def _add_by_row(dy, index, total, padding):
    """total[index[t]] += dy[t] for every t but those of row `padding`; dy (..., H).

    total (V, H) is float32 or of dy's dtype, in which a sum is rounded once.
    """
    v, h = total.shape
    ids, order = torch.sort(index.flatten(), stable=True)
    t, block_n = ids.numel(), _columns(h)
    block_t = max(16, triton.next_power_of_2(math.isqrt(t)) // 2)
    blocks = triton.cdiv(t, block_t)
    head, tail = torch.empty(2, blocks, h, dtype=torch.float32, device=dy.device)
    col_tiles, warps = triton.cdiv(h, block_n), max(1, block_n // 128)
    _bwd_kernel[(blocks * col_tiles,)](
        dy, ids, order, total, head, tail, t, v, h, padding, block_t, BLOCK_N=block_n, num_warps=warps
    )
    if t > block_t:
        last = ids[block_t - 1 :: block_t].contiguous()  # of each whole block
        run_end = torch.searchsorted(ids, last, right=True)
        _join_kernel[(last.numel() * col_tiles,)](
            ids, run_end, total, head, tail, v, h, padding, block_t, BLOCK_N=block_n, num_warps=warps
        )


def table_arguments(ids, weight, positions, position_weight, segments, segment_weight):
    """(the tensors, the sizes, the flags) that `add_rows` takes of the tables."""
    tensors = (ids, weight, positions, position_weight, segments, segment_weight)
    rows = (1 if t is None else t.shape[0] for t in (position_weight, segment_weight))
    sizes = (ids.shape[-1] if ids.dim() else 1, weight.shape[0], *rows, weight.shape[1])
    flags = {
        "HAS_POSITION": position_weight is not None, "GIVEN": positions is not None,
        "HAS_SEGMENT": segment_weight is not None, "SEGMENTED": segments is not None,
    }  # fmt: skip
    return tensors, sizes, flags


def add_table_gradients(dy, ids, positions, segments, padding_idx, dweight, dposition, dsegment):
    """Adds the rows of dy (..., H), the gradient of each token's sum, to the gradients that are wanted."""
    if dweight is not None:
        _add_by_row(dy, ids, dweight, -1 if padding_idx is None else padding_idx)
    if dposition is not None:
        if positions is not None:
            _add_by_row(dy, positions, dposition, -1)
        else:
            s = ids.shape[-1]
            add_partial_rows(dy.view(ids.numel() // s, -1), dposition[:s].view(-1))
    if dsegment is not None:
        _add_by_row(dy, torch.zeros_like(ids) if segments is None else segments, dsegment, -1)


def forward(ids, weight, positions, position_weight, segments, segment_weight, padding_idx, y):
    if y.numel() == 0:
        return
    block_n = _columns(weight.shape[1])
    block_m = 1024 // block_n
    tensors, sizes, flags = table_arguments(
        ids, weight, positions, position_weight, segments, segment_weight
    )
    _fwd_kernel[(triton.cdiv(ids.numel(), block_m) * triton.cdiv(weight.shape[1], block_n),)](
        *tensors, y, ids.numel(), *sizes, **flags, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4
    )


def backward(
    dy, ids, weight, positions, position_weight, segments, segment_weight, padding_idx, dweight, dposition, dsegment
):  # fmt: skip
    if dy.numel():
        add_table_gradients(dy, ids, positions, segments, padding_idx, dweight, dposition, dsegment)


def compile_cases():
    """Tokens alone, with places and segments given, with ids in int32; narrow tables, whose tiles hold more rows."""
    ids = meta(8, 1024, dtype=torch.int64)
    yield {"ids": ids, "weight": meta(50257, 768)}
    yield {"ids": ids, "weight": meta(50257, 768), "positions": ids, "position_weight": meta(1024, 768)}
    yield {"ids": ids, "weight": meta(50257, 768), "segments": ids, "segment_weight": meta(2, 768)}
    yield {"ids": meta(8, 1024, dtype=torch.int32), "weight": meta(50257, 768)}
    for h in (64, 128, 100):
        yield {"ids": ids, "weight": meta(4096, h, dtype=torch.float32)}
