"""GELU of a sum with a bias, in Triton.

Forward: one program a tile of rows and columns; without a bias the tensor is one long row.

Backward: for each column tile a fixed number of programs, each over every P-th row tile, that write dx and
sum du over their rows in float32 into one partial row of their own; these are then added in order.

With F the normal distribution function or the sigmoid of 2 z, F(u) = 1 - F(-u), so both need only t = |u| and
the tail F(-t), which keeps its relative accuracy:

    y = max(u, 0) - t * F(-t)      dy/du = g for u < 0 and 1 - g for u >= 0, with g = F(-t) - t * F'(t)

The normal tail is exp(-t**2 / 2) * R(t), where R(t) = erfcx(t / sqrt(2)) / 2 is a polynomial in
1 / (1 + 0.3 t), our own minimax fit with a relative error of 6e-8 on [0, 14.6]; the one exponential serves
the derivative too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import device_programs, meta
from .layer_norm import add_partial_rows

__all__ = ["backward", "compile_cases", "forward"]

_TILE = 2048  # elements a program holds at once


@triton.jit
def _tanh_tail(b_t):
    """F(-t) and F'(t) for F = sigmoid(2 z), z = sqrt(2 / pi) * (t + 0.044715 t**3)."""
    b_exp = tl.exp(-1.5957691216057308 * b_t * (1.0 + 0.044715 * b_t * b_t))
    b_r = 1.0 / (1.0 + b_exp)
    b_tail = b_exp * b_r
    return b_tail, b_tail * b_r * (1.5957691216057308 + 0.2140644488177208 * b_t * b_t)


@triton.jit
def _normal_tail(b_t):
    """F(-t) and F'(t) for the normal distribution function."""
    b_s = 1.0 / (1.0 + 0.3 * b_t)
    b_r = 0.03841174766421318 * b_s - 0.16932860016822815
    b_r = b_r * b_s + 0.22899538278579712
    b_r = b_r * b_s - 0.07688941806554794
    b_r = b_r * b_s + 0.14279954135417938
    b_r = b_r * b_s + 0.0945713147521019
    b_r = b_r * b_s + 0.1219489648938179
    b_r = b_r * b_s + 0.11948368698358536
    b_r = b_r * b_s + 7.402495612041093e-06
    b_exp = tl.exp(-0.5 * b_t * b_t)
    return b_exp * b_r, b_exp * 0.3989422804014327


@triton.jit
def _load_sum(x, bias, i_row, i_col, m, m_col, N, HAS_BIAS: tl.constexpr):
    """u, and |u| where the tail is not yet 0; beyond, infinity times 0 would be NaN. A NaN passes."""
    b_u = tl.load(x + i_row[:, None] * N + i_col[None, :], mask=m, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_u += tl.load(bias + i_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    b_t = tl.abs(b_u)
    return b_u, tl.where(b_t > 40.0, 40.0, b_t)


@triton.jit
def _fwd_kernel(x, bias, y, M, N, HAS_BIAS: tl.constexpr, TANH: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    col_tiles = tl.cdiv(N, BLOCK_N)
    i_row = (tl.program_id(0) // col_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_col = (tl.program_id(0) % col_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_col = i_col < N
    m = (i_row < M)[:, None] & m_col[None, :]
    b_u, b_t = _load_sum(x, bias, i_row, i_col, m, m_col, N, HAS_BIAS)  # [BLOCK_M, BLOCK_N]
    if TANH:
        b_tail, _ = _tanh_tail(b_t)
    else:
        b_tail, _ = _normal_tail(b_t)
    b_y = tl.where(b_u < 0.0, 0.0, b_u) - b_t * b_tail
    tl.store(y + i_row[:, None] * N + i_col[None, :], b_y.to(y.dtype.element_ty), mask=m)


@triton.jit
def _bwd_kernel(dy, x, bias, dx, p_dbias, M, N, PROGRAMS, HAS_BIAS: tl.constexpr, TANH: tl.constexpr,
                WANT_DX: tl.constexpr, WANT_DB: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    col_tiles = tl.cdiv(N, BLOCK_N)
    i_program = (tl.program_id(0) // col_tiles).to(tl.int64)
    i_col = (tl.program_id(0) % col_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_col = i_col < N
    b_db = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_start in range(i_program * BLOCK_M, M, PROGRAMS * BLOCK_M):
        i_row = i_start + tl.arange(0, BLOCK_M)
        m = (i_row < M)[:, None] & m_col[None, :]
        b_u, b_t = _load_sum(x, bias, i_row, i_col, m, m_col, N, HAS_BIAS)
        if TANH:
            b_tail, b_slope = _tanh_tail(b_t)
        else:
            b_tail, b_slope = _normal_tail(b_t)
        b_g = b_tail - b_t * b_slope
        b_dy = tl.load(dy + i_row[:, None] * N + i_col[None, :], mask=m, other=0.0).to(tl.float32)
        b_du = b_dy * tl.where(b_u < 0.0, b_g, 1.0 - b_g)  # [BLOCK_M, BLOCK_N]
        if WANT_DX:
            tl.store(dx + i_row[:, None] * N + i_col[None, :], b_du.to(dx.dtype.element_ty), mask=m)
        if WANT_DB:
            b_db += b_du
    if WANT_DB:
        tl.store(p_dbias + i_program * N + i_col, tl.sum(b_db, 0), mask=m_col)


def _tile(n: int) -> tuple[int, int]:
    """(rows, columns) of a tile."""
    columns = min(triton.next_power_of_2(n), 512)
    return _TILE // columns, columns


def forward(x, bias, approximate, y):
    if x.numel() == 0:
        return
    n = x.numel() if bias is None else x.shape[-1]
    rows = x.numel() // n
    block_m, block_n = _tile(n)
    _fwd_kernel[(triton.cdiv(rows, block_m) * triton.cdiv(n, block_n),)](
        x, bias, y, rows, n, HAS_BIAS=bias is not None, TANH=approximate == "tanh",
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip


def backward(dy, x, bias, approximate, dx, dbias):
    if x.numel() == 0:
        return
    n = x.numel() if bias is None else x.shape[-1]
    rows = x.numel() // n
    block_m, block_n = _tile(n)
    row_tiles, col_tiles = triton.cdiv(rows, block_m), triton.cdiv(n, block_n)
    programs = row_tiles
    if dbias is not None:
        programs = min(programs, triton.cdiv(device_programs(x.device, 8), col_tiles))
    partial = None if dbias is None else torch.empty(programs, n, dtype=torch.float32, device=x.device)
    _bwd_kernel[(programs * col_tiles,)](
        dy, x, bias, dx, partial, rows, n, programs, HAS_BIAS=bias is not None, TANH=approximate == "tanh",
        WANT_DX=dx is not None, WANT_DB=dbias is not None, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
    )  # fmt: skip
    if partial is not None:
        add_partial_rows(partial, dbias)


def compile_cases():
    """Both formulas without a bias and with one of x's dtype; every width of a tile below the widest."""
    for approximate in ("tanh", "none"):
        yield {"x": meta(8192, 3072), "approximate": approximate}
        yield {"x": meta(8192, 3072), "bias": meta(3072), "approximate": approximate}
    for n in (64, 128, 256):
        yield {"x": meta(8192, n), "bias": meta(n), "approximate": "tanh"}
    yield {"x": meta(8192, 1023), "bias": meta(1023), "approximate": "none"}
