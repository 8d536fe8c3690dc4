"""The activations and the gated units in Triton: one forward and one backward kernel for eight ops.

    y = dropout(act(gate + gate_bias) * (up + up_bias))        without `up`, the second factor is 1

Forward: one program a tile of rows and columns. Rows are read where they lie, a stride apart, so the halves of a packed
projection cost no copy. Without a bias, contiguous tensors are one long row.

Backward: without biases, as forward. With a bias, for each column tile a fixed number of programs, each over every P-th
row tile, that write their gradients and sum them over their rows in float32 into one partial row of their own; these
are then added in order.

With F the normal distribution function or a sigmoid, F(u) = 1 - F(-u), so u * F(u) needs only t = |u| and the tail
F(-t), which keeps its relative accuracy:

    act(u) = max(u, 0) - t * F(-t)      act'(u) = g for u < 0 and 1 - g for u >= 0, with g = F(-t) - t * F'(t)

The normal tail is exp(-t**2 / 2) * R(t), where R(t) = erfcx(t / sqrt(2)) / 2 is a polynomial in
1 / (1 + 0.3 t), our own minimax fit with a relative error of 6e-8 on [0, 14.6]; the one exponential serves
the derivative too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import device_programs
from .layer_norm import add_partial_rows
from .philox import philox_lanes

__all__ = ["backward", "forward", "gated_backward", "gated_forward"]

_TILE = 2048  # elements a program holds at once
_TILE_BACKWARD = 1024  # fewer where two halves, their sums and a mask are held


@triton.jit
def _tanh_tail(b_t):
    """F(-t) and F'(t) for F = sigmoid(2 z), z = sqrt(2 / pi) * (t + 0.044715 t**3)."""
    b_exp = tl.exp(-1.5957691216057308 * b_t * (1.0 + 0.044715 * b_t * b_t))
    b_r = 1.0 / (1.0 + b_exp)
    b_tail = b_exp * b_r
    return b_tail, b_tail * b_r * (1.5957691216057308 + 0.2140644488177208 * b_t * b_t)


@triton.jit
def _logistic_tail(b_t):
    """F(-t) and F'(t) for F = sigmoid."""
    b_exp = tl.exp(-b_t)
    b_r = 1.0 / (1.0 + b_exp)
    b_tail = b_exp * b_r
    return b_tail, b_tail * b_r


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
def _activation(b_u, FORM: tl.constexpr):
    """(act(u), act'(u)); what is not used is not computed."""
    if FORM == "relu":
        b_value = tl.where(b_u <= 0.0, 0.0, b_u)
        b_slope = tl.where(b_u <= 0.0, 0.0, 1.0)
    elif FORM == "relu_squared":
        b_r = tl.where(b_u <= 0.0, 0.0, b_u)
        b_value = b_r * b_r
        b_slope = 2.0 * b_r
    else:
        b_t = tl.abs(b_u)
        b_t = tl.where(b_t > 128.0, 128.0, b_t)  # the tail is 0 there; infinity times 0 would be NaN. A NaN passes
        if FORM == "silu":
            b_tail, b_tail_slope = _logistic_tail(b_t)
        elif FORM == "gelu_tanh":
            b_tail, b_tail_slope = _tanh_tail(b_t)
        else:
            b_tail, b_tail_slope = _normal_tail(b_t)
        b_value = tl.where(b_u < 0.0, 0.0, b_u) - b_t * b_tail
        b_g = b_tail - b_t * b_tail_slope
        b_slope = tl.where(b_u < 0.0, b_g, 1.0 - b_g)
    return b_value, b_slope


@triton.jit
def _load(x, bias, i_row, i_col, m, m_col, stride, HAS_BIAS: tl.constexpr):
    """x + bias in float32."""
    b_u = tl.load(x + i_row[:, None] * stride + i_col[None, :], mask=m, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_u += tl.load(bias + i_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    return b_u


@triton.jit
def _drop(b_y, seed, i_row, i_start, N, threshold, scale, SHARED: tl.constexpr,
          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Dropout of a tile whose columns begin at i_start. SHARED: N is a multiple of 4, so four columns share a counter."""
    if SHARED:
        i_counter = i_row[:, None] * (N // 4) + (i_start // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
        b_words = philox_lanes(tl.load(seed), i_counter, i_counter >> 32, 0, 0)  # [BLOCK_M, BLOCK_N]
    else:
        i = i_row[:, None] * N + (i_start + tl.arange(0, BLOCK_N))[None, :]
        i_counter = i >> 2
        b_0, b_1, b_2, b_3 = tl.philox(
            tl.load(seed), i_counter.to(tl.uint32), (i_counter >> 32).to(tl.uint32),
            tl.zeros([BLOCK_M, BLOCK_N], tl.uint32), tl.zeros([BLOCK_M, BLOCK_N], tl.uint32), n_rounds=10,
        )  # fmt: skip
        b_low = tl.where((i & 1) == 0, b_0, b_1)
        b_words = tl.where((i & 2) == 0, b_low, tl.where((i & 1) == 0, b_2, b_3))
    return tl.where(b_words >= tl.cast(threshold, tl.uint32), b_y * scale, 0.0)


@triton.jit
def _fwd_kernel(gate, up, gate_bias, up_bias, seed, y, M, N, gate_stride, up_stride, threshold, scale,
                FORM: tl.constexpr, GATED: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr,
                DROPOUT: tl.constexpr, SHARED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    col_tiles = tl.cdiv(N, BLOCK_N)
    i_row = (tl.program_id(0) // col_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_start = (tl.program_id(0) % col_tiles).to(tl.int64) * BLOCK_N
    i_col = i_start + tl.arange(0, BLOCK_N)
    m_col = i_col < N
    m = (i_row < M)[:, None] & m_col[None, :]
    b_u = _load(gate, gate_bias, i_row, i_col, m, m_col, gate_stride, HAS_GATE_BIAS)  # [BLOCK_M, BLOCK_N]
    b_y, _ = _activation(b_u, FORM)
    if GATED:
        b_y *= _load(up, up_bias, i_row, i_col, m, m_col, up_stride, HAS_UP_BIAS)
    if DROPOUT:
        b_y = _drop(b_y, seed, i_row, i_start, N, threshold, scale, SHARED, BLOCK_M, BLOCK_N)
    tl.store(y + i_row[:, None] * N + i_col[None, :], b_y.to(y.dtype.element_ty), mask=m)


@triton.jit
def _bwd_kernel(dy, gate, up, gate_bias, up_bias, seed, d_gate, d_up, p_gate, p_up, M, N, dy_stride, gate_stride,
                up_stride, d_gate_stride, d_up_stride, threshold, scale, PROGRAMS,
                FORM: tl.constexpr, GATED: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr,
                DROPOUT: tl.constexpr, SHARED: tl.constexpr, WANT_GATE: tl.constexpr, WANT_UP: tl.constexpr,
                SUM_GATE: tl.constexpr, SUM_UP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    col_tiles = tl.cdiv(N, BLOCK_N)
    i_program = (tl.program_id(0) // col_tiles).to(tl.int64)
    i_start = (tl.program_id(0) % col_tiles).to(tl.int64) * BLOCK_N
    i_col = i_start + tl.arange(0, BLOCK_N)
    m_col = i_col < N
    b_gate_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_up_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_first in range(i_program * BLOCK_M, M, PROGRAMS * BLOCK_M):
        i_row = i_first + tl.arange(0, BLOCK_M)
        m = (i_row < M)[:, None] & m_col[None, :]
        b_u = _load(gate, gate_bias, i_row, i_col, m, m_col, gate_stride, HAS_GATE_BIAS)
        b_value, b_slope = _activation(b_u, FORM)
        b_dy = _load(dy, None, i_row, i_col, m, m_col, dy_stride, False)
        if DROPOUT:
            b_dy = _drop(b_dy, seed, i_row, i_start, N, threshold, scale, SHARED, BLOCK_M, BLOCK_N)
        b_d_gate = b_dy * b_slope
        if GATED:
            if WANT_GATE or SUM_GATE:
                b_d_gate *= _load(up, up_bias, i_row, i_col, m, m_col, up_stride, HAS_UP_BIAS)
            b_d_up = b_dy * b_value
            if WANT_UP:
                b_out = b_d_up.to(d_up.dtype.element_ty)
                tl.store(d_up + i_row[:, None] * d_up_stride + i_col[None, :], b_out, mask=m)
            if SUM_UP:
                b_up_sum += b_d_up
        if WANT_GATE:
            b_out = b_d_gate.to(d_gate.dtype.element_ty)
            tl.store(d_gate + i_row[:, None] * d_gate_stride + i_col[None, :], b_out, mask=m)
        if SUM_GATE:
            b_gate_sum += b_d_gate
    if SUM_GATE:
        tl.store(p_gate + i_program * N + i_col, tl.sum(b_gate_sum, 0), mask=m_col)
    if SUM_UP:
        tl.store(p_up + i_program * N + i_col, tl.sum(b_up_sum, 0), mask=m_col)


def _rows(tensors, biased):
    """Each tensor as (rows, N), a view unless its rows are not evenly spaced; one long row where that serves."""
    there = [t for t in tensors if t is not None]
    if there[0].dim() == 0 or (not biased and all(t.is_contiguous() for t in there)):
        return [None if t is None else t.reshape(1, -1) for t in tensors]
    return [None if t is None else t.reshape(-1, t.shape[-1]) for t in tensors]


def _stride(t):
    return 0 if t is None else t.stride(0)


def _tile(rows, n, elements):
    """(rows, columns) of a tile: all its elements in a row that is alone, else at most 512."""
    columns = min(max(triton.next_power_of_2(n), 4), elements if rows == 1 else 512)
    return 1 if rows == 1 else elements // columns, columns


def _forward(form, gate, up, gate_bias, up_bias, seed, p, y):
    if y.numel() == 0:
        return
    threshold = 0 if seed is None else int(p * 2.0**32)
    if threshold == 2**32:
        y.zero_()
        return
    biased = gate_bias is not None or up_bias is not None
    gate, up, out = _rows((gate, up, y), biased)
    rows, n = out.shape
    block_m, block_n = _tile(rows, n, _TILE)
    _fwd_kernel[(triton.cdiv(rows, block_m) * triton.cdiv(n, block_n),)](
        gate, up, gate_bias, up_bias, seed, out, rows, n, gate.stride(0), _stride(up), threshold,
        1.0 / (1.0 - p), FORM=form, GATED=up is not None, HAS_GATE_BIAS=gate_bias is not None,
        HAS_UP_BIAS=up_bias is not None, DROPOUT=seed is not None, SHARED=n % 4 == 0 or rows == 1,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip


def _backward(form, dy, gate, up, gate_bias, up_bias, seed, p, d_gate, d_up, d_gate_bias, d_up_bias):
    wanted = [d for d in (d_gate, d_up, d_gate_bias, d_up_bias) if d is not None]
    if dy.numel() == 0 or not wanted:
        return
    threshold = 0 if seed is None else int(p * 2.0**32)
    if threshold == 2**32:
        for d in (d_gate, d_up):
            if d is not None:
                d.zero_()
        return
    biased = gate_bias is not None or up_bias is not None
    dy, gate, up, d_gate, d_up = _rows((dy, gate, up, d_gate, d_up), biased)
    rows, n = dy.shape
    summed = d_gate_bias is not None or d_up_bias is not None
    elements = _TILE_BACKWARD if up is not None else _TILE
    block_m, block_n = _tile(rows, n, elements)
    col_tiles, programs = triton.cdiv(n, block_n), triton.cdiv(rows, block_m)
    if summed:
        programs = min(programs, triton.cdiv(device_programs(dy.device, 8), col_tiles))
    partial = [
        None if d is None else torch.empty(programs, n, dtype=torch.float32, device=dy.device)
        for d in (d_gate_bias, d_up_bias)
    ]
    _bwd_kernel[(programs * col_tiles,)](
        dy, gate, up, gate_bias, up_bias, seed, d_gate, d_up, *partial, rows, n, dy.stride(0), gate.stride(0),
        _stride(up), _stride(d_gate), _stride(d_up), threshold, 1.0 / (1.0 - p), programs, FORM=form,
        GATED=up is not None, HAS_GATE_BIAS=gate_bias is not None, HAS_UP_BIAS=up_bias is not None,
        DROPOUT=seed is not None, SHARED=n % 4 == 0 or rows == 1, WANT_GATE=d_gate is not None,
        WANT_UP=d_up is not None, SUM_GATE=d_gate_bias is not None, SUM_UP=d_up_bias is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8 if elements == _TILE else 4,
    )  # fmt: skip
    for sums, d in zip(partial, (d_gate_bias, d_up_bias), strict=True):
        if sums is not None:
            add_partial_rows(sums, d)


def forward(form, x, bias, seed, p, y):
    _forward(form, x, None, bias, None, seed, p, y)


def backward(form, dy, x, bias, seed, p, dx, dbias):
    _backward(form, dy, x, None, bias, None, seed, p, dx, None, dbias, None)


def _halves(t, up_first):
    """(gate, up) of a packed tensor; of None, two."""
    return (None, None) if t is None else t.chunk(2, -1)[:: -1 if up_first else 1]


def gated_forward(form, gate, up, gate_bias, up_bias, seed, up_first, p, y):
    if up is None:
        (gate, up), (gate_bias, up_bias) = _halves(gate, up_first), _halves(gate_bias, up_first)
    _forward(form, gate, up, gate_bias, up_bias, seed, p, y)


def gated_backward(form, dy, gate, up, gate_bias, up_bias, seed, up_first, p, d_gate, d_up, d_gate_bias, d_up_bias):
    if up is None:
        (gate, up), (gate_bias, up_bias) = _halves(gate, up_first), _halves(gate_bias, up_first)
        (d_gate, d_up), (d_gate_bias, d_up_bias) = _halves(d_gate, up_first), _halves(d_gate_bias, up_first)
    _backward(form, dy, gate, up, gate_bias, up_bias, seed, p, d_gate, d_up, d_gate_bias, d_up_bias)
