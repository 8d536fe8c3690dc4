"""The recurrent layers in Triton: what lstm, gru and rnn share.

A step is the recurrent product, by cuBLAS into float32, and one kernel that does all the rest of it: forward the gates,
the state, the output and what backward reads in one pass over (batch, hidden); backward the gradients of all gates, and
what the state before gets beside the product. Each program has a tile of rows and units. Nothing waits for the host, so a
CUDA graph captures the loop with its launches. The weight's gradient is one product over all steps, after them.

Sums run in a fixed order: cuBLAS's within a product, torch.sum's for the bias. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import INTERPRETING, meta, tanh

__all__ = ["compile_cases_of", "launch_backward", "launch_forward"]

_TILE = 1024  # elements of (batch, hidden) in a program
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@triton.jit
def _sigmoid(b_x):
    return 1.0 / (1.0 + tl.exp(-b_x))


@triton.jit
def _put(p, i, here, b_x, mask):
    """Store b_x, or 0 where not here, rounded to nearest: Triton's interpreter truncates to bfloat16."""
    b_x = tl.where(here, b_x, 0.0)
    if INTERPRETING and p.dtype.element_ty == tl.bfloat16:
        b_i = b_x.to(tl.int32, bitcast=True)
        b_i = b_i + 0x7FFF + ((b_i >> 16) & 1)
        b_x = (b_i & -0x10000).to(tl.float32, bitcast=True)
    tl.store(p + i, b_x.to(p.dtype.element_ty), mask)


@triton.jit
def _gate(x, product, bias, i_x, i_p, cols, mask, HAS_BIAS: tl.constexpr):
    """A gate's part of x, and that of the product with its bias."""
    b_x = tl.load(x + i_x, mask, other=0.0).to(tl.float32)
    b_r = tl.load(product + i_p, mask, other=0.0)
    if HAS_BIAS:
        b_r += tl.load(bias + cols, cols >= 0, other=0.0).to(tl.float32)[None, :]
    return b_x, b_r


@triton.jit(do_not_specialize=["t"])
def _fwd_kernel(x, product, bias, before, c_before, lengths, y, after, kept, cells, t, B, H, x_row,
                CELL: tl.constexpr, GATES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
                ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """One step: all pointers but lengths and bias are to that step's slice."""
    i_b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_h = tl.program_id(1) * COLS + tl.arange(0, COLS)
    rows, cols = i_b < B, i_h < H
    mask = rows[:, None] & cols[None, :]
    here = mask
    if HAS_LENGTHS:
        here = mask & (t < tl.load(lengths + i_b, rows, other=0))[:, None]
    i = i_b[:, None] * H + i_h[None, :]  # [ROWS, COLS] in (batch, hidden)
    i_x = i_b[:, None] * x_row + i_h[None, :]
    i_p = i_b[:, None] * (GATES * H) + i_h[None, :]
    i_k = i_b[:, None] * (4 * H) + i_h[None, :]
    i_n = tl.where(cols, i_h, 0)
    b_old = tl.load(before + i, mask, other=0.0).to(tl.float32)
    b_x0, b_r0 = _gate(x, product, bias, i_x, i_p, i_n, mask, HAS_BIAS)
    if CELL == "rnn_tanh":
        b_new = tanh(b_x0 + b_r0)
    elif CELL == "rnn_relu":
        b_new = tl.maximum(b_x0 + b_r0, 0.0)
    else:
        b_x1, b_r1 = _gate(x, product, bias, i_x + H, i_p + H, i_n + H, mask, HAS_BIAS)
        b_x2, b_r2 = _gate(x, product, bias, i_x + 2 * H, i_p + 2 * H, i_n + 2 * H, mask, HAS_BIAS)
        b_0, b_1 = _sigmoid(b_x0 + b_r0), _sigmoid(b_x1 + b_r1)
        if CELL == "lstm":
            b_x3, b_r3 = _gate(x, product, bias, i_x + 3 * H, i_p + 3 * H, i_n + 3 * H, mask, HAS_BIAS)
            b_2, b_3 = tanh(b_x2 + b_r2), _sigmoid(b_x3 + b_r3)
            b_c_old = tl.load(c_before + i, mask, other=0.0)
            b_c = b_1 * b_c_old + b_0 * b_2
            b_new = b_3 * tanh(b_c)
            tl.store(cells + i, tl.where(here, b_c, b_c_old), mask)
        else:
            b_2, b_3 = tanh(b_x2 + b_0 * b_r2), b_r2
            b_new = (1.0 - b_1) * b_2 + b_1 * b_old
        _put(kept, i_k, here, b_0, mask)
        _put(kept, i_k + H, here, b_1, mask)
        _put(kept, i_k + 2 * H, here, b_2, mask)
        _put(kept, i_k + 3 * H, here, b_3, mask)
    _put(y, i, here, b_new, mask)
    _put(after, i, mask, tl.where(here, b_new, b_old), mask)


@triton.jit(do_not_specialize=["t"])
def _bwd_kernel(dy, dh, dc, y, before, first, kept, cells, c_before, lengths, dx, d_recurrent, t, B, H, dy_row,
                CELL: tl.constexpr, GATES: tl.constexpr, HAS_DY: tl.constexpr, HAS_LENGTHS: tl.constexpr,
                REVERSE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """One step, in place on dh and dc; before: the output a step before, first: the state that a row begins with."""
    i_b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_h = tl.program_id(1) * COLS + tl.arange(0, COLS)
    rows, cols = i_b < B, i_h < H
    mask = rows[:, None] & cols[None, :]
    here = mask
    if HAS_LENGTHS:
        b_length = tl.load(lengths + i_b, rows, other=0)
        here = mask & (t < b_length)[:, None]
    i = i_b[:, None] * H + i_h[None, :]  # [ROWS, COLS] in (batch, hidden)
    i_d = i_b[:, None] * (GATES * H) + i_h[None, :]
    i_k = i_b[:, None] * (4 * H) + i_h[None, :]
    b_y = tl.load(y + i, mask, other=0.0).to(tl.float32)
    b_passed = tl.load(dh + i, mask, other=0.0)
    b_dh = b_passed
    if HAS_DY:
        b_dh += tl.load(dy + i_b[:, None] * dy_row + i_h[None, :], mask, other=0.0).to(tl.float32)
    if CELL == "rnn_tanh":
        b_0 = b_dh * (1.0 - b_y * b_y)
        tl.store(dh + i, tl.where(here, 0.0, b_passed), mask)
    elif CELL == "rnn_relu":
        b_0 = tl.where(b_y > 0.0, b_dh, 0.0)
        tl.store(dh + i, tl.where(here, 0.0, b_passed), mask)
    else:
        b_k0 = tl.load(kept + i_k, mask, other=0.0).to(tl.float32)
        b_k1 = tl.load(kept + i_k + H, mask, other=0.0).to(tl.float32)
        b_k2 = tl.load(kept + i_k + 2 * H, mask, other=0.0).to(tl.float32)
        b_k3 = tl.load(kept + i_k + 3 * H, mask, other=0.0).to(tl.float32)
        if CELL == "lstm":
            b_t = tanh(tl.load(cells + i, mask, other=0.0))
            b_c_passed = tl.load(dc + i, mask, other=0.0)
            b_dc = b_c_passed + b_dh * b_k3 * (1.0 - b_t * b_t)
            b_0 = b_dc * b_k2 * b_k0 * (1.0 - b_k0)
            b_1 = b_dc * tl.load(c_before + i, mask, other=0.0) * b_k1 * (1.0 - b_k1)
            b_2 = b_dc * b_k0 * (1.0 - b_k2 * b_k2)
            b_3 = b_dh * b_t * b_k3 * (1.0 - b_k3)
            _put(dx, i_d + 3 * H, here, b_3, mask)
            tl.store(dc + i, tl.where(here, b_dc * b_k1, b_c_passed), mask)
            tl.store(dh + i, tl.where(here, 0.0, b_passed), mask)
        else:
            b_before = tl.load(before + i, mask, other=0.0).to(tl.float32)
            if HAS_LENGTHS and REVERSE:
                b_first = tl.load(first + i, mask, other=0.0).to(tl.float32)
                b_before = tl.where((t + 1 < b_length)[:, None], b_before, b_first)
            b_2 = b_dh * (1.0 - b_k1) * (1.0 - b_k2 * b_k2)
            b_0 = b_2 * b_k3 * b_k0 * (1.0 - b_k0)
            b_1 = b_dh * (b_before - b_k2) * b_k1 * (1.0 - b_k1)
            _put(d_recurrent, i_d, here, b_0, mask)
            _put(d_recurrent, i_d + H, here, b_1, mask)
            _put(d_recurrent, i_d + 2 * H, here, b_2 * b_k0, mask)
            tl.store(dh + i, tl.where(here, b_dh * b_k1, b_passed), mask)
        _put(dx, i_d + H, here, b_1, mask)
        _put(dx, i_d + 2 * H, here, b_2, mask)
    _put(dx, i_d, here, b_0, mask)


def _add_product(total, a, b):
    """total += a @ b in float32, whatever the dtype of a and b."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # interpreted
        total.add_(a.to(total.dtype) @ b.to(total.dtype))


def _tile(batch, hidden):
    cols = min(triton.next_power_of_2(hidden), 256)
    rows = min(triton.next_power_of_2(batch), _TILE // cols)
    return {"ROWS": rows, "COLS": cols}, (triton.cdiv(batch, rows), triton.cdiv(hidden, cols))


def _start(given, like, dtype):
    return torch.zeros(like.shape, dtype=dtype, device=like.device) if given is None else given.to(dtype).contiguous()


def launch_forward(cell, x, weight, bias, h0, c0, lengths, reverse, y, h, c, kept, cells):
    """h, c and what follows as the cell has them, else None."""
    seq, batch, hidden = y.shape
    if batch == 0:
        return
    before, c_before = _start(h0, h, h.dtype), None if c is None else _start(c0, h, torch.float32)
    if seq == 0:
        h.copy_(before)
        if c is not None:
            c.copy_(c_before)
        return
    weight = weight.contiguous()
    product = torch.empty((batch, weight.shape[0]), dtype=torch.float32, device=x.device)
    spare = [torch.empty_like(h) for _ in range(2)]
    tile, grid = _tile(batch, hidden)
    for step in range(seq):
        t = seq - 1 - step if reverse else step
        after = h if step == seq - 1 else spare[step % 2]
        _add_product(product.zero_(), before, weight.t())
        _fwd_kernel[grid](
            x[t], product, bias, before, c_before, lengths, y[t], after, None if kept is None else kept[t],
            None if cells is None else cells[t], t, batch, hidden, x.stride(1), CELL=cell, GATES=_GATES[cell],
            HAS_BIAS=bias is not None, HAS_LENGTHS=lengths is not None, **tile,
        )  # fmt: skip
        before, c_before = after, None if cells is None else cells[t]
    if c is not None:
        c.copy_(c_before)


def launch_backward(
    cell, dy, dh, dc, weight, h0, c0, lengths, y, kept, cells, reverse, dx, dweight, dbias, dh0, dc0
):
    """dc, c0, kept, cells and dc0 as the cell has them, else None; dweight and dbias are added to."""
    seq, batch, hidden = y.shape
    if batch == 0:
        return
    weight = weight.contiguous()
    like, wide, width = y.new_empty((batch, hidden)), torch.float32, weight.shape[0]
    first, has_c = _start(h0, like, y.dtype), cells is not None
    first_c = _start(c0, like, wide) if has_c else None
    dh = _start(dh, like, wide).clone()
    dc = _start(dc, like, wide).clone() if has_c else None
    dx = torch.empty((seq, batch, width), dtype=y.dtype, device=y.device) if dx is None else dx
    d_recurrent = torch.empty_like(dx) if cell == "gru" else dx
    tile, grid = _tile(batch, hidden)
    for step in range(seq):
        t = step if reverse else seq - 1 - step
        starts, s = step == seq - 1, t + 1 if reverse else t - 1
        _bwd_kernel[grid](
            None if dy is None else dy[t], dh, dc, y[t], first if starts else y[s], first,
            None if kept is None else kept[t], cells[t] if has_c else None,
            (first_c if starts else cells[s]) if has_c else None, lengths, dx[t], d_recurrent[t], t, batch, hidden,
            0 if dy is None else dy.stride(1), CELL=cell, GATES=_GATES[cell], HAS_DY=dy is not None,
            HAS_LENGTHS=lengths is not None, REVERSE=reverse, **tile,
        )  # fmt: skip
        _add_product(dh, d_recurrent[t], weight)
    if dh0 is not None:
        dh0.copy_(dh)
    if dc0 is not None:
        dc0.copy_(dc)
    if seq == 0:
        return
    if dweight is not None:
        later, outputs = (d_recurrent[:-1], y[1:]) if reverse else (d_recurrent[1:], y[:-1])
        _add_product(dweight, later.reshape(-1, width).t(), outputs.reshape(-1, hidden))
        if h0 is not None:
            begins = d_recurrent[seq - 1 if reverse else 0]
            if reverse and lengths is not None:  # each row begins at its own last element
                last = (lengths.clamp(1, seq) - 1).view(1, batch, 1).expand(1, batch, width)
                begins = d_recurrent.gather(0, last)[0]
            _add_product(dweight, begins.t(), first)
    if dbias is not None:
        dbias.add_(torch.sum(d_recurrent, (0, 1), dtype=wide))


def compile_cases_of(cell, gates, **more):
    """Two steps at widths that 16, 8 and nothing divides, with and without what is optional."""
    for hidden in (1024, 650, 37):
        yield {"x": meta(2, 64, gates * hidden), "weight": meta(gates * hidden, hidden), **more}
    state = {f"{s}0": meta(64, 1024) for s in ("h", "c")[: 1 + (cell == "lstm")]}
    full = {"x": meta(2, 64, gates * 1024), "weight": meta(gates * 1024, 1024), "bias": meta(gates * 1024)}
    yield {**full, **state, **more}
    lengths = meta(64, dtype=torch.int64)
    for reverse in (False, True):
        yield {**full, **state, "lengths": lengths, "reverse": reverse, **more}
    yield {"x": meta(2, 8, gates * 64, dtype=torch.float32), "weight": meta(gates * 64, 64, dtype=torch.float32), **more}
