"""Token and position embedding in Triton.

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

__all__ = ["backward", "compile_cases", "forward"]


@triton.jit
def _gather(table, i_row, i_col, m, V, H):
    """Rows of a table in float32; NaN for a row that it has not."""
    m_good = (i_row >= 0) & (i_row < V)
    b_rows = tl.load(table + i_row[:, None] * H + i_col[None, :], mask=m & m_good[:, None], other=0.0)
    return tl.where(m_good[:, None], b_rows.to(tl.float32), float("nan"))


@triton.jit
def _fwd_kernel(ids, weight, positions, position_weight, y, T, S, V, P, H, HAS_POSITION: tl.constexpr,
                GIVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    col_tiles = tl.cdiv(H, BLOCK_N)
    i_t = (tl.program_id(0) // col_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_col = tl.program_id(0) % col_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_t = i_t < T
    m = m_t[:, None] & (i_col < H)[None, :]
    i_id = tl.load(ids + i_t, mask=m_t, other=0).to(tl.int64)
    b_y = _gather(weight, i_id, i_col, m, V, H)  # [BLOCK_M, BLOCK_N]
    if HAS_POSITION:
        if GIVEN:
            i_p = tl.load(positions + i_t, mask=m_t, other=0).to(tl.int64)
        else:
            i_p = i_t % S
        b_y += _gather(position_weight, i_p, i_col, m, P, H)
    tl.store(y + i_t[:, None] * H + i_col[None, :], b_y.to(y.dtype.element_ty), mask=m)


@triton.jit
def _bwd_kernel(dy, ids, order, total, head, tail, T, V, H, BLOCK_T, BLOCK_N: tl.constexpr):
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
        m_add = m_col & ~entered & ~open & (i_id >= 0) & (i_id < V)
        b_old = tl.load(total + i_id * H + i_col, mask=m_add, other=0.0)
        tl.store(total + i_id * H + i_col, b_old + b_sum, mask=m_add)
        b_sum = tl.where(open, b_sum, 0.0)
        entered = entered & open
        i_id = i_next
    tl.store(head + i_block * H + i_col, b_sum, mask=m_col & entered & open)
    tl.store(tail + i_block * H + i_col, b_sum, mask=m_col & ~entered & open)


@triton.jit
def _join_kernel(ids, run_end, total, head, tail, V, H, BLOCK_T, BLOCK_N: tl.constexpr):
    """Adds up the run that begins in a block and goes on behind it, if there is one."""
    col_tiles = tl.cdiv(H, BLOCK_N)
    i_block = (tl.program_id(0) // col_tiles).to(tl.int64)
    i_col = tl.program_id(0) % col_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_col = i_col < H
    i_first = i_block * BLOCK_T
    i_id = tl.load(ids + i_first + BLOCK_T - 1).to(tl.int64)
    began = (i_first == 0) | (tl.load(ids + i_first - 1, mask=i_first > 0, other=0) != i_id)
    i_last = (tl.load(run_end + i_block) - 1) // BLOCK_T  # the block in which the run ends
    if began & (i_last > i_block) & (i_id >= 0) & (i_id < V):
        b_sum = tl.load(tail + i_block * H + i_col, mask=m_col, other=0.0)
        for i in range(i_block + 1, i_last + 1):
            b_sum += tl.load(head + i * H + i_col, mask=m_col, other=0.0)
        b_old = tl.load(total + i_id * H + i_col, mask=m_col, other=0.0)
        tl.store(total + i_id * H + i_col, b_old + b_sum, mask=m_col)


def _columns(h: int) -> int:
    return min(triton.next_power_of_2(h), 256)


def _add_rows(dy, index, total):
    """total[index[t]] += dy[t] for every t; dy (..., H), total (V, H) float32."""
    v, h = total.shape
    ids, order = torch.sort(index.flatten(), stable=True)
    t, block_n = ids.numel(), _columns(h)
    block_t = max(16, triton.next_power_of_2(math.isqrt(t)) // 2)
    blocks = triton.cdiv(t, block_t)
    head, tail = torch.empty(2, blocks, h, dtype=torch.float32, device=dy.device)
    col_tiles, warps = triton.cdiv(h, block_n), max(1, block_n // 128)
    _bwd_kernel[(blocks * col_tiles,)](
        dy, ids, order, total, head, tail, t, v, h, block_t, BLOCK_N=block_n, num_warps=warps
    )
    if t > block_t:
        last = ids[block_t - 1 :: block_t].contiguous()  # of each whole block
        run_end = torch.searchsorted(ids, last, right=True)
        _join_kernel[(last.numel() * col_tiles,)](
            ids, run_end, total, head, tail, v, h, block_t, BLOCK_N=block_n, num_warps=warps
        )


def forward(ids, weight, positions, position_weight, y):
    if y.numel() == 0:
        return
    v, h = weight.shape
    block_n = _columns(h)
    block_m = 1024 // block_n
    _fwd_kernel[(triton.cdiv(ids.numel(), block_m) * triton.cdiv(h, block_n),)](
        ids, weight, positions, position_weight, y, ids.numel(), ids.shape[-1] if ids.dim() else 1, v,
        1 if position_weight is None else position_weight.shape[0], h,
        HAS_POSITION=position_weight is not None, GIVEN=positions is not None, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip


def backward(dy, ids, weight, positions, position_weight, dweight, dposition_weight):
    if dy.numel() == 0:
        return
    if dweight is not None:
        _add_rows(dy, ids, dweight)
    if dposition_weight is not None:
        if positions is not None:
            _add_rows(dy, positions, dposition_weight)
        else:
            s = ids.shape[-1]
            add_partial_rows(dy.view(ids.numel() // s, -1), dposition_weight[:s].view(-1))


def compile_cases():
    """Tokens alone, with places given, with ids in int32; narrow tables, whose tiles hold more rows."""
    ids = meta(8, 1024, dtype=torch.int64)
    yield {"ids": ids, "weight": meta(50257, 768)}
    yield {"ids": ids, "weight": meta(50257, 768), "positions": ids, "position_weight": meta(1024, 768)}
    yield {"ids": meta(8, 1024, dtype=torch.int32), "weight": meta(50257, 768)}
    for h in (64, 128, 100):
        yield {"ids": ids, "weight": meta(4096, h, dtype=torch.float32)}
